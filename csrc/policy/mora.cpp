// SPDX-License-Identifier: Apache-2.0
// MoRA: how many tokens at a time. Its kernels need no scratch memory.
#include "mora.h"

#include <algorithm>

#include "choice.h"

namespace lrk {

int64_t choose_mora_rows(int64_t slots, Target target) {
  const int64_t elements = target.device == Device::kCPU ? int64_t{1} << 19 : int64_t{1} << 23;
  return std::max<int64_t>(16, elements / std::max<int64_t>(1, slots));
}

size_t mora_rotation_workspace(const MoraRotationParams&, Target) { return 0; }
size_t mora_fold_workspace(const MoraFoldParams&, Target) { return 0; }
size_t mora_unfold_workspace(const MoraUnfoldParams&, Target) { return 0; }

namespace {

Answer explain_rows(const Question& q) {
  const int64_t rows = choose_mora_rows(q["P"], q.target()), panels = ceil_div(q["T"], rows);
  return {{{"rows", rows}, {"panels", panels}},
          text("type 6 folds and multiplies ", rows, " tokens of ", q["P"], " slots at a time, ", panels, " times")};
}

const Registered registered[] = {
    {"mora_rows",
     {.rule = "type 6: as many tokens as 2^19 elements on the CPU and 2^23 on CUDA, 16 at the least",
      .numbers =
          "CPU: 2 MB of fp32, of 512 tokens of 2048 fold and unfold take 0.66 ms, with half of it 0.81; CUDA: a count, 16 MB in "
          "16 bits are a third of an H100's L2",
      .arguments = {{"T", {}}, {"P", {}}},
      .answer = explain_rows}},
};

}  // namespace

}  // namespace lrk
