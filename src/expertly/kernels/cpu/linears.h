// Linear layers: any number of (weight, rows of x) jobs in one parallel region.
#pragma once

namespace {

constexpr int64_t kRun = 8;  // blocks in an item: neighbours, so that they are prefetched

// Some rows of a job; its items are runs of weight blocks.
struct LinearTask {
  const Job *job;
  int64_t first, rows;  // within the job
  int64_t begin, end;   // its items
};

// The blocks of one item; task: null when there are no more.
struct LinearItem {
  const LinearTask *task;
  Matrix m;
  int64_t block, end;
};

struct LinearsRun {
  const Linears *call;
  Rows rows;
  LinearTask *tasks;
  Desk *desks;
  int64_t items, next;
  int64_t run;  // blocks in an item
  bool serial;  // x is made ready before the region
};

// In how many terms a job's weights meet x. Rounding to 4 bits loses more than a second would keep.
INLINE int64_t terms_of(const Linears &call, const Job &job) {
  return call.fine && job.weight->bits == 8 ? 2 : 1;
}

INLINE int64_t job_rows_at_once(const Linears &call, const Job &job) {
  int64_t cols = job.weight->cols;
  int64_t rows = rows_at_once(job.weight->bits == 16 ? floats_stride(cols) : chunks_stride(cols));
  return rows / terms_of(call, job);
}

// How many blocks a thread takes at once: few where there are few.
INLINE int64_t run_of(const Linears &call) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < call.n; i++) blocks += call.jobs[i].weight->rows / kLanes;
  if (call.threads == 1 || blocks >= 16 * kRun * call.threads) return kRun;
  return most_blocks(call.tokens);
}

static int64_t place_tasks(const Linears &call, LinearTask *tasks) {
  int64_t count = 0, items = 0;
  for (const Job *job = call.jobs; job < call.jobs + call.n; job++) {
    int64_t step = job_rows_at_once(call, *job);
    for (int64_t first = 0; first < job->rows; first += step, count++) {
      int64_t begin = items;
      items += ceil_div(job->weight->rows, kLanes * run_of(call));
      if (tasks) tasks[count] = {job, first, smaller(step, job->rows - first), begin, items};
    }
  }
  return tasks ? items : count;
}

static void place_linears(LinearsRun *run, Arena *arena) {
  const Linears &call = *run->call;
  bool chunks = false, floats = false, rests = false;
  for (int64_t i = 0; i < call.n; i++) {
    (call.jobs[i].weight->bits == 16 ? floats : chunks) = true;
    rests = rests || terms_of(call, call.jobs[i]) == 2;
  }
  run->rows.x = call.x;
  run->rows.cols = call.cols;
  place_rows(&run->rows, arena, call.tokens, chunks, floats);
  if (rests) run->rows.rests = arena->get<char>(call.tokens * run->rows.chunk_stride);
  run->tasks = arena->get<LinearTask>(place_tasks(call, 0));
  run->desks = arena->get<Desk>(call.threads);
  for (int i = 0; i < call.threads; i++) {
    Desk desk = place_desk(arena, 0);
    if (run->desks) run->desks[i] = desk;
  }
}

// Adds terms and bias and writes what counts of (terms * rows, blocks * 16) products from output
// row `at` on.
static void finish_linear(const LinearTask &task, const float *out, int64_t at, int64_t blocks,
                          int64_t terms) {
  const Job &job = *task.job;
  int64_t width = job.weight->out, second = task.rows * blocks * kLanes;
  for (int64_t b = 0; b < blocks; b++, at += kLanes) {
    if (at >= width) return;
    F bias = job.bias ? load_first({job.bias, EXPERTLY_FLOAT32}, at, width - at) : zero();
    for (int64_t t = 0; t < task.rows; t++) {
      const float *product = out + (t * blocks + b) * kLanes;
      F y = add(load(product), bias);
      if (terms == 2) y = add(y, load(product + second));
      store_first(job.y, (task.first + t) * width + at, y, width - at);
    }
  }
}

// The next item that is free, of `task` or one behind it.
static LinearItem take_item(LinearsRun &run, const LinearTask *task) {
  int64_t item = take(&run.next);
  if (item >= run.items) return {};
  while (item >= task->end) task++;
  Matrix m = matrix_of(*task->job->weight, task->job->expert);
  int64_t block = (item - task->begin) * run.run;
  return {task, m, block, smaller(block + run.run, m.blocks)};
}

static void linear_item(const LinearsRun &run, const LinearItem &item, const Place &next,
                        Desk &desk) {
  const LinearTask &task = *item.task;
  const Job &job = *task.job;
  const Matrix &m = item.m;
  int64_t terms = terms_of(*run.call, job), count = terms * task.rows;
  for (int64_t t = 0; t < task.rows; t++) {
    int64_t row = job.first + task.first + t;
    desk.x[t] = run.rows.row(m.bits, row);
    if (terms == 2) desk.x[task.rows + t] = run.rows.rests + row * run.rows.chunk_stride;
  }
  for (int64_t block = item.block, blocks; block < item.end; block += blocks) {
    blocks = blocks_at_once(count, item.end - block);
    Place after = block + blocks < item.end ? place_of(m, block + blocks) : next;
    multiply(m, block, blocks, desk.x, count, after, desk.room, desk.out);
    finish_linear(task, desk.out, block * kLanes, blocks, terms);
  }
}

// The item after the present one is taken before it, so that its weights are on their way.
static void work_on_linears(void *context, int thread, int threads) {
  LinearsRun &run = *(LinearsRun *)context;
  if (!run.serial) {
    prepare_rows(run.rows, run.call->tokens);
    wait_for_team(threads);
  }
  LinearItem item = take_item(run, run.tasks);
  while (item.task) {
    LinearItem next = take_item(run, item.task);
    const LinearItem &after = next.task ? next : item;
    linear_item(run, item, place_of(after.m, after.block), run.desks[thread]);
    item = next;
  }
}

static int run_linears(const Linears &call) {
  LinearsRun run = {};
  run.call = &call;
  void *memory = lay_out(&run, place_linears);
  if (!memory) return EXPERTLY_MEMORY;
  run.run = run_of(call);
  run.items = place_tasks(call, run.tasks);
  run.serial = call.tokens * call.cols <= kSerial || call.threads == 1;
  if (run.serial) prepare_rows(run.rows, call.tokens);
  if (run.items > 0) run_team(call.threads, work_on_linears, &run);
  free(memory);
  return 0;
}

}  // namespace
