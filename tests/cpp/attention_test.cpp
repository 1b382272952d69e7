// Tests of the attention core without torch.
#include "harness.h"

int main() { return alignops::test::run_all(); }
