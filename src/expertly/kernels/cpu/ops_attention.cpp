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

template <class W>
void norm(const Leaves &leaves, const expertly_attention &form, const void *weight, int64_t dim,
          float *x) {
  leaves.of(W()).normalise(x, dim, (const W *)weight, form.eps);
}

void norm(const Leaves &leaves, const expertly_attention &form, const void *weight, int64_t dim,
          float *x) {
  if (form.norm_type == EXPERTLY_FLOAT32)
    norm<float>(leaves, form, weight, dim, x);
  else
    norm<uint16_t>(leaves, form, weight, dim, x);
}

// What a family does to its queries or keys before they meet: x is (heads, head_dim).
template <class T>
void prepare(const Leaves &leaves, const expertly_attention &form, const void *weight,
             int64_t heads, const T *cos, const T *sin, int64_t rotated, float *x) {
  const int64_t dim = form.head_dim;
  if (form.norm == 2) norm(leaves, form, weight, heads * dim, x);
  for (int64_t head = 0; head < heads; head++, x += dim) {
    if (form.norm == 1) norm(leaves, form, weight, dim, x);
    leaves.of(T()).rotate(x, cos, sin, rotated);
    if (form.norm == 3) norm(leaves, form, weight, dim, x);
  }
}

// One call's work.
template <class T>
struct Call {
  const Leaves *leaves;
  const expertly_attention *form;
  const expertly_decoding *now;
  int64_t shared, count;  // heads of the cache, of all sequences; tokens with the new one
  T *out;
  float *q;        // (batch, heads, head_dim), placed
  float *scratch;  // (threads, count + head_dim)
  int64_t next;    // head
};

// Queries into call.q, keys and values into the cache. scratch: (heads + 2 kv_heads) head_dim.
template <class T>
void prepare_sequence(const Call<T> &call, int64_t row, float *scratch) {
  const expertly_attention &form = *call.form;
  const expertly_decoding &now = *call.now;
  const LeavesOf<T> &leaf = call.leaves->of(T());
  const int64_t dim = form.head_dim, wide = form.heads * dim, slim = form.kv_heads * dim;
  const int64_t at = now.rotated_batch == 1 ? 0 : row * now.rotated;
  const T *cos = (const T *)now.cos + at, *sin = (const T *)now.sin + at;
  float *q = scratch, *k = q + wide, *v = k + slim;
  leaf.load((const T *)now.q + row * wide, wide, form.clip, q);
  leaf.load((const T *)now.k + row * slim, slim, form.clip, k);
  leaf.load((const T *)now.v + row * slim, slim, form.clip, v);
  prepare(*call.leaves, form, form.q_norm, form.heads, cos, sin, now.rotated, q);
  prepare(*call.leaves, form, form.k_norm, form.kv_heads, cos, sin, now.rotated, k);
  leaf.place(q, wide, call.q + row * wide);
  for (int64_t head = 0; head < form.kv_heads; head++) {
    const int64_t to = ((row * form.kv_heads + head) * now.room + now.length) * dim;
    leaf.store(k + head * dim, dim, (T *)now.keys + to);
    leaf.store(v + head * dim, dim, (T *)now.values + to);
  }
}

// The queries that share one head of the cache.
template <class T>
void attend_head(const Call<T> &call, int64_t head, float *scratch) {
  const LeavesOf<T> &leaf = call.leaves->of(T());
  const int64_t dim = call.form->head_dim, past = head * call.now->room * dim;
  const int64_t group = call.form->heads / call.form->kv_heads;
  for (int64_t each = head * group; each < (head + 1) * group; each++) {
    leaf.dots(call.q + each * dim, (const T *)call.now->keys + past, call.count, dim, scratch);
    call.leaves->softmax(scratch, call.count, call.form->scale);
    leaf.mix(scratch, (const T *)call.now->values + past, call.count, dim, scratch + call.count);
    leaf.put_back(scratch + call.count, dim, call.out + each * dim);
  }
}

template <class T>
void work(void *context, int thread, int) {
  Call<T> &call = *(Call<T> *)context;
  float *scratch = call.scratch + thread * (call.count + call.form->head_dim);
  for (int64_t head = take(&call.next); head < call.shared; head = take(&call.next))
    attend_head(call, head, scratch);
}

template <class T>
void attend(const Leaves &leaves, int threads, const expertly_attention &form,
            const expertly_decoding &now, int64_t batch, T *out) {
  const int64_t dim = form.head_dim, shared = batch * form.kv_heads, count = now.length + 1;
  if (shared * count * dim < kWorthWaking) threads = 1;
  std::vector<float> row((form.heads + 2 * form.kv_heads) * dim), q(batch * form.heads * dim);
  std::vector<float> scratch(threads * (count + dim));
  Call<T> call{&leaves, &form, &now, shared, count, out, q.data(), scratch.data(), 0};
  for (int64_t each = 0; each < batch; each++) prepare_sequence(call, each, row.data());
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
