// SPDX-License-Identifier: Apache-2.0
// Random bases: choices and scratch memory.
#include "basis.h"

#include <algorithm>

#include "choice.h"

namespace lrk {

// CUDA: splits are to give a GPU some thousand warps (dot: of 8 rows of G and 4 bases each; the others: of 32 times 16
// columns), but none so short that to add them up would cost more than they do.
int64_t choose_basis_dot_splits(int64_t T, int64_t K, Target target) {
  if (target.device == Device::kCUDA)
    return std::clamp<int64_t>(4096 / std::max<int64_t>(1, ceil_div(T, 8) * ceil_div(K, 4)), 1, 128);
  return std::clamp<int64_t>((int64_t{1} << 22) / std::max<int64_t>(1, T * K), 1, 32);
}
int64_t choose_basis_matmul_splits(int64_t Q, int64_t C, Target target) {
  if (target.device == Device::kCUDA) {
    const int64_t most = std::clamp<int64_t>(ceil_div(Q, 8), 1, 64);
    return std::clamp<int64_t>((int64_t{1} << 20) / std::max<int64_t>(1, C), 1, most);
  }
  const int64_t groups = std::max<int64_t>(1, ceil_div(C, 256));
  return std::clamp<int64_t>(32 / groups, 1, std::max<int64_t>(1, ceil_div(Q, 128)));
}
int64_t choose_basis_transposed_splits(int64_t Q, int64_t C, Target target) {
  if (target.device == Device::kCPU) return 1;
  const int64_t most = std::max<int64_t>(1, ceil_div(C, 32 * kBasisColumns));  // a warp's strips
  return std::clamp<int64_t>(256 / std::max<int64_t>(1, ceil_div(Q, 16)), 1, most);
}
int64_t choose_basis_combine_splits(int64_t R, int64_t W, int64_t K, Target target) {
  if (target.device == Device::kCPU) return 1;
  const int64_t most = std::clamp<int64_t>(ceil_div(K, 16), 1, 32);
  return std::clamp<int64_t>((int64_t{1} << 20) / std::max<int64_t>(1, R * W), 1, most);
}
BasisMatmulLayout basis_matmul_layout(const BasisMatmulParams& p, Target target) {
  // A warp's 32 threads take their columns of x without asking for its end; a thread those of a partial sum.
  const int64_t span = p.transposed ? 32 * kBasisColumns : kBasisColumns, width = ceil_div(p.C, span) * span;
  if (p.transposed) return {p.T * width, width, choose_basis_transposed_splits(p.Q, p.C, target)};
  return {ceil_div(p.T, kBasisSums) * kBasisSums * p.Q, width, p.Q ? choose_basis_matmul_splits(p.Q, p.C, target) : 0};
}

constexpr int64_t kFewTokens = 16;  // whose sums stay in registers

RandLoraWay choose_randlora(int64_t T, int64_t I, int64_t O) {
  if (T <= kFewTokens) return RandLoraWay::kVector;
  return T * (I + O) > I * O ? RandLoraWay::kMerged : RandLoraWay::kFactors;
}

BasisMatmulConfig choose_basis_matmul(int64_t T, int64_t Q, int64_t C, bool transposed, Target target) {
  const int64_t elements =
      target.device == Device::kCPU ? int64_t{1} << 20 : int64_t{1} << 23;  // 4 MB; 16 MB in 16 bits
  BasisMatmulConfig c{T > kFewTokens, Q, C};
  const int64_t fixed = std::max<int64_t>(1, transposed ? C : Q);
  const int64_t most = std::max<int64_t>(128, elements / fixed / 128 * 128);
  (transposed ? c.rows : c.cols) = std::min(transposed ? Q : C, most);
  return c;
}

bool choose_basis_product(const BasisMatmulParams& p, Target target) {
  const bool wide = p.x_dtype != p.out_dtype || (p.x_dtype == DType::kF16 && (p.in_scale || p.out_scale));
  // A kernel counts the terms of a sum in 32 bits, and tiles of tokens in an axis of its grid.
  const bool short_enough = (p.transposed ? p.C : p.Q) < int64_t{1} << 30 && p.T <= int64_t{1} << 22;
  return target.device == Device::kCUDA && p.T > kFewTokens && p.Q && p.C && wide && short_enough;
}
BasisProductLayout basis_product_layout(const BasisMatmulParams& p) {
  // In place: whole 16-byte vectors, and U in one term of x's type or beside bf16 in two.
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_pitch % 8 == 0;
  const bool exact = p.u.distribution == Distribution::kUniform8 && !p.in_scale;
  const bool direct = aligned && (p.x_dtype == DType::kBF16 || (p.x_dtype == DType::kF16 && exact));
  return {direct, direct ? 0 : ceil_div(p.transposed ? p.C : p.Q, int64_t{8}) * 8};
}
size_t basis_product_workspace(const BasisMatmulParams& p, Target) {
  return 2 * p.T * basis_product_layout(p).width * size_of(DType::kBF16);
}

size_t basis_fill_workspace(const BasisFillParams&, Target) { return 0; }

// The coefficients times scale; on CUDA the sums of splits.
size_t basis_combine_workspace(const BasisCombineParams& p, Target target) {
  const int64_t W = p.segments.begin[p.segments.count], K = p.segments.first[p.segments.count];
  if (target.device == Device::kCPU) return p.T * K * sizeof(float);
  const int64_t splits = choose_basis_combine_splits(p.R, W, K, target);
  return splits > 1 ? splits * p.T * p.R * W * sizeof(float) : 0;
}

size_t basis_dot_workspace(const BasisDotParams& p, Target target) {
  const int64_t K = p.segments.first[p.segments.count];
  return choose_basis_dot_splits(p.T, K, target) * p.T * K * sizeof(float);
}

// x in fp32, for the CPU's widest vectors, and the sums of splits.
size_t basis_matmul_workspace(const BasisMatmulParams& p, Target target) {
  if (target.device == Device::kCUDA) {
    const BasisMatmulLayout at = basis_matmul_layout(p, target);
    const int64_t sums = p.transposed ? (at.splits > 1 ? p.Q : 0) : at.width;
    return (at.x + at.splits * p.T * sums) * sizeof(float);
  }
  const int64_t span = 16 * block_columns(p.u.distribution), width = ceil_div(p.C, span) * span;
  const int64_t x = p.transposed ? width : p.Q,
                sums = p.transposed ? p.Q : choose_basis_matmul_splits(p.Q, p.C, target) * width;
  return p.T * (x + sums) * sizeof(float);
}

namespace {

Answer explain_matmul(const Question& q) {
  const bool transposed = q.flag("transposed");
  const BasisMatmulConfig c = choose_basis_matmul(q["T"], q["Q"], q["C"], transposed, q.target());
  const int64_t splits = c.scratch    ? 1
                         : transposed ? choose_basis_transposed_splits(q["Q"], q["C"], q.target())
                                      : choose_basis_matmul_splits(q["Q"], q["C"], q.target());
  return {{{"scratch", c.scratch}, {"rows", c.rows}, {"cols", c.cols}, {"splits", splits}},
          c.scratch ? text("U is generated once, ", c.rows, " x ", c.cols,
                           " at a time in scratch memory, for a plain GEMM: many tokens share it")
                    : "U stays in registers: for so few tokens writing it and reading it back costs more"};
}

Answer splits_answer(int64_t splits) {
  return {{{"splits", splits}},
          splits > 1 ? "partial sums, added in order: the outputs alone leave the machine idle"
                     : "one sum: there are outputs enough"};
}
Answer explain_combine(const Question& q) {
  return splits_answer(choose_basis_combine_splits(q["R"], q["W"], q["K"], q.target()));
}
Answer explain_dot(const Question& q) { return splits_answer(choose_basis_dot_splits(q["T"], q["K"], q.target())); }

Answer explain_randlora(const Question& q) {
  const int64_t T = q["T"], I = q["I"], O = q["O"], Q = std::min(I, O);
  const RandLoraWay way = choose_randlora(T, I, O);
  if (way == RandLoraWay::kVector)
    return {{{"way", "vector"}}, "few tokens: no row of U is formed, B stays in registers"};
  return {{{"way", way == RandLoraWay::kMerged ? "merged" : "factors"}},
          text(2 * T * Q * (I + O), " flop by factors, ", 2 * Q * I * O, " merged")};
}

const Registered registered[] = {
    {"basis_matmul",
     {.rule =
          "U in registers for up to 16 tokens, else in scratch memory for a GEMM; x U of few columns in splits of Q, CUDA: x U^T "
          "of few rows in splits of C; CUDA: tiles in shared memory where x and the result differ in type",
      .numbers =
          "counts: scratch of 4 MB (CUDA: 2^23 elements) fits the nearest large cache, 2^20 columns are some thousand "
          "warps, at least 8 rows a split; not measured",
      .arguments = {{"T", {}}, {"Q", {}}, {"C", {}}, {"transposed", false}},
      .answer = explain_matmul}},
    {"basis_combine",
     {.rule = "CUDA: splits of K where the result has fewer than 2^20 elements",
      .numbers = "counts: some thousand warps; 16 bases or more a split, at most 32 splits; not measured",
      .arguments = {{"R", {}}, {"W", {}}, {"K", {}}},
      .answer = explain_combine}},
    {"basis_dot",
     {.rule = "splits of rows and columns, more where T K is small",
      .numbers =
          "counts: 4096 warps, at most 128 splits on CUDA; 16 MB of partial sums, at most 32 on the CPU; not measured",
      .arguments = {{"T", {}}, {"K", {}}},
      .answer = explain_dot}},
    {"randlora",
     {.rule = "vector for T <= 16, merged for T > I O / (I + O), else factors",
      .numbers = "a count of flop: 2 T Q (I + O) by factors, 2 Q I O merged, Q = min(I, O)",
      .arguments = {{"T", {}}, {"I", {}}, {"O", {}}},
      .answer = explain_randlora}},
};

}  // namespace

}  // namespace lrk
