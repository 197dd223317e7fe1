// Everything that is compiled once for each instruction set, over the vectors defined before it.
#pragma once
// clang-format off: each file uses the ones before
#include "matrix.h"
#include "tile.h"
#include "rows.h"
#include "gate.h"
#include "linears.h"
#include "experts.h"
#include "norm.h"

namespace {
constexpr Kernels kKernels = {run_linears, run_experts, run_rms_norm};
}
