// Decoder layers in one call: the other entry points one after the other, by threads that stay
// awake between them. Each checks its own arguments; here is checked that they fit one another.
#include "layer.h"

#include <new>
#include <vector>

#include "team.h"

namespace expertly {
namespace {

int64_t width_of(int type) { return type == EXPERTLY_BFLOAT16 ? 2 : 4; }

// One call, what lies between its steps, and how it went.
struct Step {
  int isa, threads;
  int64_t count;
  const expertly_layer *layers;
  const expertly_decoding *places;
  const void *x;
  int type;
  int64_t batch;
  void *y, *normed;
  const expertly_layer *layer;  // the one that is at work, and
  expertly_decoding now;        // its place
  std::vector<char> q, k, v, heads, out, weights;
  std::vector<float> logits, wide;
  std::vector<int64_t> ids;
  int code;
};

int64_t dim_of(const expertly_layer &layer) { return layer.norms[0].dim; }

int norm(const Step &step, int which, const void *x, void *y) {
  expertly_norm form = step.layer->norms[which];
  form.x = x, form.y = y, form.rows = step.batch;
  form.x_type = form.y_type = step.type;
  return expertly_rms_norm(step.isa, &form);
}

int project(const Step &step, int first, int count, const void *x, void *const *y) {
  return expertly_linears(step.isa, step.threads, count, step.layer->projections + first,
                          step.layer->biases + first, x, step.type, step.batch, y, step.type);
}

template <class T>
void add(const LeavesOf<T> &leaf, const void *x, const void *more, void *y, int64_t count) {
  std::vector<float> sum(count), term(count);
  leaf.load((const T *)x, count, 0, sum.data());
  leaf.load((const T *)more, count, 0, term.data());
  for (int64_t i = 0; i < count; i++) sum[i] += term[i];
  leaf.store(sum.data(), count, (T *)y);
}

// y = x + more, rounded as torch rounds.
void add(const Step &step, const void *x, const void *more) {
  const Leaves &leaves = *leaves_of(step.isa);
  const int64_t count = step.batch * dim_of(*step.layer);
  if (step.type == EXPERTLY_FLOAT32)
    add(leaves.float32, x, more, step.y, count);
  else
    add(leaves.bfloat16, x, more, step.y, count);
}

int attention(Step &step) {
  const expertly_layer &layer = *step.layer;
  const int64_t bytes = step.batch * width_of(step.type);
  std::vector<char> *three[] = {&step.q, &step.k, &step.v};
  void *places[3];
  for (int i = 0; i < 3; i++) {
    three[i]->resize(bytes * layer.projections[i]->out);
    places[i] = three[i]->data();
  }
  step.heads.resize(bytes * layer.attention.heads * layer.attention.head_dim);
  step.out.resize(bytes * dim_of(layer));
  void *out = step.out.data();
  step.now.q = places[0], step.now.k = places[1], step.now.v = places[2];
  int code = norm(step, 0, step.x, step.normed);
  if (!code) code = project(step, 0, 3, step.normed, places);
  if (!code)
    code = expertly_attend(step.isa, step.threads, &layer.attention, &step.now, step.type,
                           step.batch, step.heads.data());
  if (!code) code = project(step, 3, 1, step.heads.data(), &out);
  if (code) return code;
  add(step, step.x, out);
  return norm(step, 1, step.y, step.normed);
}

// The experts that the router names, and their weights in float32.
int route(Step &step) {
  const expertly_layer &layer = *step.layer;
  const int64_t count = step.batch * layer.router.top_k;
  step.logits.resize(step.batch * layer.router.experts);
  step.weights.resize(count * width_of(layer.weights_type));
  step.ids.resize(count);
  step.wide.resize(count);
  int code = expertly_route(step.isa, step.threads, &layer.router, step.normed, step.type,
                            step.batch, step.logits.data(), EXPERTLY_FLOAT32,
                            step.weights.data(), layer.weights_type, step.ids.data());
  if (code) return code;
  const Leaves &leaves = *leaves_of(step.isa);
  if (layer.weights_type == EXPERTLY_FLOAT32)
    leaves.float32.load((const float *)step.weights.data(), count, 0, step.wide.data());
  else
    leaves.bfloat16.load((const uint16_t *)step.weights.data(), count, 0, step.wide.data());
  return 0;
}

int experts(Step &step) {
  const expertly_layer &layer = *step.layer;
  int code = route(step);
  if (!code)
    code = expertly_experts(step.isa, step.threads, layer.gate_up, layer.down, layer.gate_up_bias,
                            layer.down_bias, &layer.gate, step.normed, step.type, step.ids.data(),
                            step.wide.data(), step.batch, layer.router.top_k, step.out.data(),
                            step.type);
  if (!code) add(step, step.y, step.out.data());
  return code;
}

void run(void *context) {
  Step &step = *(Step *)context;
  try {
    for (int64_t i = 0; i < step.count && !step.code; i++) {
      step.layer = step.layers + i;
      step.now = step.places[i];
      step.code = attention(step);
      if (!step.code && step.layer->router.weight) step.code = experts(step);
      step.x = step.y;
    }
  } catch (const std::bad_alloc &) {
    step.code = EXPERTLY_MEMORY;
  }
}

bool fits(const expertly_weight *weight, int64_t out, int64_t cols) {
  return weight && weight->out == out && weight->cols == cols;
}

// Whether each part gives what the next one takes.
int check_layer(const expertly_layer &layer, int64_t batch) {
  const expertly_attention &form = layer.attention;
  const int64_t dim = dim_of(layer), most = 1 << 24;
  if (dim < 1 || dim > most || batch < 1 || batch > most) return EXPERTLY_SIZE;
  if (form.heads < 1 || form.heads > 1 << 16 || form.kv_heads < 1 ||
      form.kv_heads > form.heads || form.head_dim < 1 || form.head_dim > 1 << 16)
    return EXPERTLY_HEADS;
  const int64_t wide = form.heads * form.head_dim, slim = form.kv_heads * form.head_dim;
  bool whole = layer.norms[1].dim == dim && fits(layer.projections[0], wide, dim) &&
               fits(layer.projections[1], slim, dim) && fits(layer.projections[2], slim, dim) &&
               fits(layer.projections[3], dim, wide);
  if (!whole) return EXPERTLY_PAIR;
  if (!layer.router.weight) return 0;
  const expertly_router &router = layer.router;
  if (router.experts < 1 || router.experts > most) return EXPERTLY_SIZE;
  if (router.top_k < 1 || router.top_k > router.experts) return EXPERTLY_TOP_K;
  if (layer.weights_type != EXPERTLY_FLOAT32 && layer.weights_type != EXPERTLY_BFLOAT16)
    return EXPERTLY_TYPE;
  bool fit = layer.gate_up && layer.gate_up->cols == dim && layer.down &&
             layer.down->out == dim && router.dim == dim;
  return fit ? 0 : EXPERTLY_PAIR;
}

}  // namespace
}  // namespace expertly

int expertly_decode_layers(int isa, int threads, int64_t count, const expertly_layer *layers,
                           const expertly_decoding *now, const void *x, int type, int64_t batch,
                           void *y, void *normed) {
  using namespace expertly;
  if (!leaves_of(isa)) return EXPERTLY_ISA;
  if (threads < 1 || threads > 4096) return EXPERTLY_THREADS;
  if (!layers || !now || !x || !y || !normed) return EXPERTLY_NULL;
  if (type != EXPERTLY_FLOAT32 && type != EXPERTLY_BFLOAT16) return EXPERTLY_TYPE;
  if (count < 1) return EXPERTLY_SIZE;
  for (int64_t i = 0; i < count; i++) {
    if (int code = check_layer(layers[i], batch)) return code;
    if (dim_of(layers[i]) != dim_of(layers[0])) return EXPERTLY_PAIR;
    if (i + 1 < count && !layers[i].router.weight) return EXPERTLY_NULL;
  }
  Step step = {};
  step.isa = isa, step.threads = threads, step.count = count, step.layers = layers;
  step.places = now, step.x = x, step.type = type, step.batch = batch;
  step.y = y, step.normed = normed;
  hold_team(threads, run, &step);
  return step.code;
}
