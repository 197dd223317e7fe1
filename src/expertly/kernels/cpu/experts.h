// A whole experts layer in one parallel region.
//
// Assignments are sorted by expert, so that an expert's weights are read once however many tokens
// chose it. First every (expert, some columns of h) item: gate, up, activation, quantised in place.
// After a barrier every group of output rows: all experts' down projections, weighed and added in
// float32 by the one thread that owns those rows.
#pragma once

namespace {

constexpr int64_t kSegment = 4096;      // tokens at a time, which bounds the memory
constexpr int64_t kSumBytes = 1 << 19;  // of a thread's sums

// Some of one expert's assignments, in sorted order.
struct ExpertTask {
  int64_t expert, first, rows;
};

struct ExpertsRun {
  const Experts *call;
  Rows x, h;           // h: one row for each assignment in sorted order
  int64_t *tokens;     // of each assignment in sorted order, and
  float *weights;      // its weight
  int64_t *begin;      // (experts + 2) positions
  ExpertTask *tasks;
  int64_t n_tasks, step;
  int64_t columns;     // blocks of columns of h
  int64_t group;       // blocks of output rows in an item of the second phase
  Desk *desks;
  int64_t next_up, next_down;
  bool serial;
};

INLINE bool counts(const Experts &call, int64_t a) {
  return call.ids[a] >= 0 && call.ids[a] < call.down->experts && call.weights[a] != 0;
}

// A counting sort of the assignments by expert, and from it the tasks.
static void sort_by_expert(ExpertsRun *run) {
  const Experts &call = *run->call;
  int64_t n = call.down->experts, total = call.tokens * call.top_k;
  memset(run->begin, 0, (size_t)(n + 2) * sizeof(int64_t));
  int64_t *ends = run->begin + 1;  // while it sorts: where the expert's next assignment goes
  for (int64_t a = 0; a < total; a++)
    if (counts(call, a)) ends[call.ids[a] + 1]++;
  for (int64_t e = 0; e < n; e++) ends[e + 1] += ends[e];
  for (int64_t a = 0; a < total; a++) {
    if (!counts(call, a)) continue;
    int64_t place = ends[call.ids[a]]++;
    run->tokens[place] = a / call.top_k;
    run->weights[place] = call.weights[a];
  }
  run->n_tasks = 0;
  for (int64_t e = 0; e < n; e++)
    for (int64_t first = run->begin[e]; first < run->begin[e + 1]; first += run->step)
      run->tasks[run->n_tasks++] = {e, first, smaller(run->step, run->begin[e + 1] - first)};
  // what is prefetched after the last
  run->tasks[run->n_tasks] = run->n_tasks ? run->tasks[0] : ExpertTask{};
}

// Blocks of output rows whose sums stay in L2, but enough groups to share out.
static int64_t group_of(const Experts &call) {
  int64_t blocks = call.down->rows / kLanes;
  int64_t group = 8;
  while (group > 2 && group * call.tokens * kLanes * 4 > kSumBytes) group /= 2;
  while (group > 2 && blocks < group * 4 * call.threads) group /= 2;
  return group;
}

static void place_experts(ExpertsRun *run, Arena *arena) {
  const Experts &call = *run->call;
  int64_t total = call.tokens * call.top_k, n = call.down->experts;
  run->x.x = call.x;
  run->x.cols = call.gate_up->cols;
  run->h.cols = call.down->cols;
  run->columns = run->h.cols / kLanes;
  bool wide = call.gate_up->bits == 16, wide_h = call.down->bits == 16;
  place_rows(&run->x, arena, call.tokens, !wide, wide);
  run->h.x.type = EXPERTLY_BFLOAT16;  // never lies ready
  place_rows(&run->h, arena, total, !wide_h, wide_h);
  run->step = smaller(rows_at_once(wide ? run->x.float_stride : run->x.chunk_stride),
                      rows_at_once(wide_h ? run->h.float_stride : run->h.chunk_stride));
  run->group = group_of(call);
  run->tokens = arena->get<int64_t>(total);
  run->weights = arena->get<float>(total);
  run->begin = arena->get<int64_t>(n + 2);
  run->tasks = arena->get<ExpertTask>(total / run->step + smaller(n, total) + 1);
  run->desks = arena->get<Desk>(call.threads);
  for (int i = 0; i < call.threads; i++) {
    Desk desk = place_desk(arena, call.tokens * run->group * kLanes);
    if (run->desks) run->desks[i] = desk;
  }
}

INLINE F biased(const float *out, const float *bias, int64_t at) {
  return bias ? add(load(out), load(bias + at)) : load(out);
}

// h of one task in the blocks of columns from `at` on, from both projections' products.
static void finish_up(ExpertsRun &run, const ExpertTask &task, int64_t at, int64_t blocks,
                      const Desk &desk) {
  const Experts &call = *run.call;
  const float *bias = call.gate_up_bias;
  if (bias) bias += task.expert * call.gate_up->out + at * kLanes;
  for (int64_t t = 0; t < task.rows; t++) {
    char *row = (char *)run.h.row(call.down->bits, task.first + t);
    F even = zero();
    for (int64_t b = 0; b < blocks; b++) {
      int64_t i = (t * blocks + b) * kLanes;
      F gate = biased(desk.out + i, bias, b * kLanes), up = zero();
      if (call.gate.gated) up = biased(desk.other + i, bias, run.h.cols + b * kLanes);
      F h = apply_gate(call.gate, gate, up);
      if (call.down->bits == 16)
        store((float *)row + (at + b) * kLanes, h);
      else if (b % 2)
        quantize(even, h, (Chunk *)row + (at + b) / 2);
      even = h;
    }
  }
}

// The blocks of columns of h of one item; task: null when there are no more.
struct UpItem {
  const ExpertTask *task;
  Matrix m;
  int64_t block, end;
};

static UpItem take_up(ExpertsRun &run) {
  int64_t runs = ceil_div(run.columns, kRun), item = take(&run.next_up);
  if (item >= run.n_tasks * runs) return {};
  const ExpertTask *task = run.tasks + item / runs;
  int64_t block = item % runs * kRun;
  return {task, matrix_of(*run.call->gate_up, task->expert), block,
          smaller(block + kRun, run.columns)};
}

static void up_item(ExpertsRun &run, const UpItem &item, const Place &next, Desk &desk) {
  const ExpertTask &task = *item.task;
  const Matrix &m = item.m;
  bool gated = run.call->gate.gated;
  for (int64_t t = 0; t < task.rows; t++)
    desk.x[t] = run.x.row(m.bits, run.tokens[task.first + t]);
  for (int64_t gate = item.block, blocks; gate < item.end; gate += blocks) {
    blocks = blocks_at_once(task.rows, item.end - gate);
    int64_t up = run.columns + gate;
    Place after = gate + blocks < item.end ? place_of(m, gate + blocks) : next;
    multiply(m, gate, blocks, desk.x, task.rows, gated ? place_of(m, up) : after, desk.room,
             desk.out);
    if (gated) multiply(m, up, blocks, desk.x, task.rows, after, desk.room, desk.other);
    finish_up(run, task, gate, blocks, desk);
  }
}

// Weighs one task's products and adds them to its tokens' sums, from block `at` of the group on.
static void add_down(const ExpertsRun &run, const ExpertTask &task, int64_t block, int64_t at,
                     int64_t blocks, const Desk &desk) {
  const Experts &call = *run.call;
  for (int64_t b = 0; b < blocks; b++) {
    int64_t row = (block + b) * kLanes;
    F bias = zero();
    if (call.down_bias && row < call.down->out) {
      const float *from = call.down_bias + task.expert * call.down->out;
      bias = load_first({from, EXPERTLY_FLOAT32}, row, call.down->out - row);
    }
    for (int64_t t = 0; t < task.rows; t++) {
      float *sum = desk.sums + (run.tokens[task.first + t] * run.group + at + b) * kLanes;
      F y = add(load(desk.out + (t * blocks + b) * kLanes), bias);
      store(sum, fma(y, all(run.weights[task.first + t]), load(sum)));
    }
  }
}

static void down_item(const ExpertsRun &run, int64_t item, int64_t next, Desk &desk) {
  const Experts &call = *run.call;
  int64_t first = item * run.group, width = call.down->out;
  int64_t end = smaller(first + run.group, call.down->rows / kLanes);
  memset(desk.sums, 0, (size_t)(call.tokens * run.group * kLanes) * sizeof(float));
  for (const ExpertTask *task = run.tasks; task < run.tasks + run.n_tasks; task++) {
    Matrix m = matrix_of(*call.down, task->expert);
    bool last = task + 1 == run.tasks + run.n_tasks;
    Place after = place_of(matrix_of(*call.down, task[1].expert), last ? next * run.group : first);
    for (int64_t t = 0; t < task->rows; t++) desk.x[t] = run.h.row(m.bits, task->first + t);
    for (int64_t block = first, blocks; block < end; block += blocks) {
      blocks = blocks_at_once(task->rows, end - block);
      Place soon = block + blocks < end ? place_of(m, block + blocks) : after;
      multiply(m, block, blocks, desk.x, task->rows, soon, desk.room, desk.out);
      add_down(run, *task, block, block - first, blocks, desk);
    }
  }
  for (int64_t t = 0; t < call.tokens; t++)
    for (int64_t row = first * kLanes; row < smaller(end * kLanes, width); row += kLanes) {
      F y = load(desk.sums + t * run.group * kLanes + row - first * kLanes);
      store_first(call.y, t * width + row, y, width - row);
    }
}

static void work_on_experts(void *context, int thread, int threads) {
  ExpertsRun &run = *(ExpertsRun *)context;
  Desk &desk = run.desks[thread];
  if (!run.serial) {
    prepare_rows(run.x, run.call->tokens);
    wait_for_team(threads);
  }
  UpItem item = take_up(run);
  while (item.task) {
    UpItem next = take_up(run);
    const UpItem &after = next.task ? next : item;
    up_item(run, item, place_of(after.m, after.block), desk);
    item = next;
  }
  wait_for_team(threads);
  int64_t items = ceil_div(run.call->down->rows / kLanes, run.group);
  for (int64_t down = take(&run.next_down), next; down < items; down = next) {
    next = take(&run.next_down);
    down_item(run, down, next < items ? next : down, desk);
  }
}

static int run_segment(const Experts &call) {
  ExpertsRun run = {};
  run.call = &call;
  void *memory = lay_out(&run, place_experts);
  if (!memory) return EXPERTLY_MEMORY;
  sort_by_expert(&run);
  run.serial = call.tokens * run.x.cols <= kSerial || call.threads == 1;
  if (run.serial) prepare_rows(run.x, call.tokens);
  run_team(call.threads, work_on_experts, &run);
  free(memory);
  return 0;
}

static int run_experts(const Experts &call) {
  for (int64_t first = 0; first < call.tokens; first += kSegment) {
    Experts part = call;
    part.tokens = smaller(kSegment, call.tokens - first);
    int64_t x_bytes = call.x.type == EXPERTLY_BFLOAT16 ? 2 : 4;
    int64_t y_bytes = call.y.type == EXPERTLY_BFLOAT16 ? 2 : 4;
    part.x.data = (const char *)call.x.data + first * call.gate_up->cols * x_bytes;
    part.y.data = (char *)call.y.data + first * call.down->out * y_bytes;
    part.ids = call.ids + first * call.top_k;
    part.weights = call.weights + first * call.top_k;
    if (int code = run_segment(part)) return code;
  }
  return 0;
}

}  // namespace
