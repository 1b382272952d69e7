// Tests of the speculative core without torch.
#include "harness.h"

int main() { return alignops::test::run_all(); }
