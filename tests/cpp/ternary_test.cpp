// Tests of the ternary kernels without torch: every level of this machine against the scalar one,
// and the scalar one against naive computations and known vectors.
#include "harness.h"

int main() { return alignops::test::run_all(); }
