// The leaves for any machine, and which leaves a machine has.
#include "ops_leaves.h"

namespace expertly {

const Leaves *portable_leaves() { return &kLeaves; }

const Leaves *leaves_of(int isa) {
  if (isa < 0 || isa > expertly_best_isa()) return 0;
#if EXPERTLY_X86
  if (isa == 2) return avx512_leaves();
  if (isa == 1) return avx2_leaves();
#endif
  return portable_leaves();
}

}  // namespace expertly
