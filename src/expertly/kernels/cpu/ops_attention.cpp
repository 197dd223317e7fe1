// Attention of one new token per sequence over a KV cache that has room for it.
//
// One call does what attention does between its projections: norms of queries and keys, rotary
// embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864, halves rotated against each other),
// the write into the cache, and softmax(q k) v, with grouped queries (Ainslie et al. 2023,
// https://arxiv.org/abs/2305.13245).
#include <new>
#include <vector>

#include "ops.h"
#include "team.h"

namespace expertly {
namespace {

constexpr int64_t kWorthWaking = 1 << 16;  // numbers of keys that pay for another thread

// Multiplies x (dim) by a norm's weight, from number `first` of it on, and a factor.
void weigh(const Leaves &leaves, const expertly_attention &form, const void *weight, int64_t first,
           int64_t dim, float factor, float *x) {
  if (form.norm_type == EXPERTLY_FLOAT32)
    leaves.float32.weigh(x, dim, (const float *)weight + first, factor);
  else
    leaves.bfloat16.weigh(x, dim, (const uint16_t *)weight + first, factor);
}

// One call's work.
template <class T>
struct Call {
  const Leaves *leaves;
  const expertly_attention *form;
  const expertly_decoding *now;
  int64_t shared, count;  // heads of the cache, of all sequences; tokens with the new one
  T *out;
  float *factors;  // (batch, 2), of a norm of all heads: of the queries and of the keys
  float *scratch;  // (threads, scratch_of)
  int64_t next;    // head
};

int64_t group_of(const expertly_attention &form) { return form.heads / form.kv_heads; }

// What a thread needs: scores, sums and placed queries of a group, and a head as it came.
int64_t scratch_of(const expertly_attention &form, int64_t count) {
  return group_of(form) * (count + 2 * form.head_dim) + form.head_dim;
}

// The norm of one head alone.
void norm_head(const Leaves &leaves, const expertly_attention &form, const void *weight, float *x) {
  const float factor = leaves.inverse_rms(x, form.head_dim, form.eps);
  weigh(leaves, form, weight, 0, form.head_dim, factor, x);
}

// x = what a family makes of one head of its queries (part 0) or keys (part 1).
template <class T>
void prepare(const Call<T> &call, int64_t row, int part, int64_t head, float *x) {
  const expertly_attention &form = *call.form;
  const expertly_decoding &now = *call.now;
  const LeavesOf<T> &leaf = call.leaves->of(T());
  const int64_t dim = form.head_dim, heads = part ? form.kv_heads : form.heads;
  const int64_t angles = now.rotated_batch == 1 ? 0 : row * now.rotated;
  const void *weight = part ? form.k_norm : form.q_norm;
  leaf.load((const T *)(part ? now.k : now.q) + (row * heads + head) * dim, dim, form.clip, x);
  if (form.norm == 2)
    weigh(*call.leaves, form, weight, head * dim, dim, call.factors[2 * row + part], x);
  if (form.norm == 1) norm_head(*call.leaves, form, weight, x);
  leaf.rotate(x, (const T *)now.cos + angles, (const T *)now.sin + angles, now.rotated);
  if (form.norm == 3) norm_head(*call.leaves, form, weight, x);
}

// A new key and value into the cache. head: of the cache, of all sequences.
template <class T>
void remember(const Call<T> &call, int64_t head, float *x) {
  const expertly_attention &form = *call.form;
  const expertly_decoding &now = *call.now;
  const LeavesOf<T> &leaf = call.leaves->of(T());
  const int64_t dim = form.head_dim, to = (head * now.room + now.length) * dim;
  prepare(call, head / form.kv_heads, 1, head % form.kv_heads, x);
  leaf.store(x, dim, (T *)now.keys + to);
  leaf.load((const T *)now.v + head * dim, dim, form.clip, x);
  leaf.store(x, dim, (T *)now.values + to);
}

// The queries that share one head of the cache.
template <class T>
void attend_head(const Call<T> &call, int64_t head, float *scores) {
  const expertly_attention &form = *call.form;
  const LeavesOf<T> &leaf = call.leaves->of(T());
  const int64_t dim = form.head_dim, group = group_of(form), count = call.count;
  const int64_t past = head * call.now->room * dim, row = head / form.kv_heads;
  float *sums = scores + group * count, *queries = sums + group * dim, *x = queries + group * dim;
  remember(call, head, x);
  for (int64_t i = 0; i < group; i++) {
    prepare(call, row, 0, head * group + i - row * form.heads, x);
    leaf.place(x, dim, queries + i * dim);
  }
  leaf.dots(queries, group, (const T *)call.now->keys + past, count, dim, scores);
  for (int64_t i = 0; i < group; i++) call.leaves->softmax(scores + i * count, count, form.scale);
  leaf.mix(scores, group, (const T *)call.now->values + past, count, dim, sums);
  leaf.put_back(sums, group * dim, call.out + head * group * dim);
}

template <class T>
void work(void *context, int thread, int) {
  Call<T> &call = *(Call<T> *)context;
  float *scratch = call.scratch + thread * scratch_of(*call.form, call.count);
  for (int64_t head = take(&call.next); head < call.shared; head = take(&call.next))
    attend_head(call, head, scratch);
}

// Of a norm of all heads together: what the queries or keys of a sequence are multiplied by.
template <class T>
float factor_of(const Leaves &leaves, const expertly_attention &form, const void *x, int64_t row,
                int64_t heads, std::vector<float> *room) {
  const int64_t wide = heads * form.head_dim;
  leaves.of(T()).load((const T *)x + row * wide, wide, form.clip, room->data());
  return leaves.inverse_rms(room->data(), wide, form.eps);
}

template <class T>
void attend(const Leaves &leaves, int threads, const expertly_attention &form,
            const expertly_decoding &now, int64_t batch, T *out) {
  const int64_t dim = form.head_dim, shared = batch * form.kv_heads, count = now.length + 1;
  if (shared * count * dim < kWorthWaking) threads = 1;
  std::vector<float> factors(2 * batch), row(form.norm == 2 ? form.heads * dim : 0);
  std::vector<float> scratch(threads * scratch_of(form, count));
  Call<T> call{&leaves, &form, &now, shared, count, out, factors.data(), scratch.data(), 0};
  for (int64_t each = 0; each < batch && form.norm == 2; each++) {
    factors[2 * each] = factor_of<T>(leaves, form, now.q, each, form.heads, &row);
    factors[2 * each + 1] = factor_of<T>(leaves, form, now.k, each, form.kv_heads, &row);
  }
  run_team(threads, work<T>, &call);
}

bool known_type(int type) { return type == EXPERTLY_FLOAT32 || type == EXPERTLY_BFLOAT16; }

int check_form(const expertly_attention &form) {
  if (form.head_dim < 32 || form.head_dim % 32 || form.head_dim > 1 << 16 || form.kv_heads < 1 ||
      form.heads < form.kv_heads || form.heads % form.kv_heads || form.heads > 1 << 16)
    return EXPERTLY_HEADS;
  if (form.norm < 0 || form.norm > 3) return EXPERTLY_NORM;
  if (!form.norm) return 0;
  return form.q_norm && form.k_norm && known_type(form.norm_type) ? 0 : EXPERTLY_NORM;
}

int check_decoding(const expertly_attention &form, const expertly_decoding &now, int64_t batch) {
  if (!now.q || !now.k || !now.v || !now.keys || !now.values) return EXPERTLY_NULL;
  if (now.length < 0 || now.length >= now.room) return EXPERTLY_ROOM;
  if (now.rotated < 0 || now.rotated > form.head_dim || now.rotated % 2 ||
      (now.rotated && (!now.cos || !now.sin)) ||
      (now.rotated_batch != 1 && now.rotated_batch != batch))
    return EXPERTLY_ROTARY;
  const int64_t most = INT64_MAX / 8 / form.heads / form.head_dim;
  return batch > most || now.room > most / batch ? EXPERTLY_OVERFLOW : 0;
}

}  // namespace
}  // namespace expertly

int expertly_attend(int isa, int threads, const expertly_attention *form,
                    const expertly_decoding *now, int type, int64_t batch, void *out) {
  using namespace expertly;
  const Leaves *leaves = leaves_of(isa);
  if (!leaves) return EXPERTLY_ISA;
  if (threads < 1 || threads > 4096) return EXPERTLY_THREADS;
  if (!form || !now || !out) return EXPERTLY_NULL;
  if (!known_type(type)) return EXPERTLY_TYPE;
  if (batch < 1) return EXPERTLY_SIZE;
  int code = check_form(*form);
  if (!code) code = check_decoding(*form, *now, batch);
  if (code) return code;
  try {
    if (type == EXPERTLY_FLOAT32)
      attend(*leaves, threads, *form, *now, batch, (float *)out);
    else
      attend(*leaves, threads, *form, *now, batch, (uint16_t *)out);
  } catch (const std::bad_alloc &) {
    return EXPERTLY_MEMORY;
  }
  return 0;
}
