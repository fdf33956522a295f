// SPDX-License-Identifier: Apache-2.0
// Runs every launcher of csrc/lora.h at params level over the emulator, with neither torch nor Python in the process, and
// compares with sums in double; results must have equal bits under every schedule tried.
#include <tuple>

#include "cuda/lora/tail.cuh"
#include "params.h"

namespace {

using namespace lrk;

struct Case {
  std::string op;
  DType dtype, factor_dtype;
  int64_t T, N;
  int32_t R;
  bool n_contig;
  int64_t pad, shift;
  double p;
  float scale;
  bool in_place, base, base_scale, bias;  // expand: what the product is added to; rescale, gemm: base is for dc
  int64_t K;                              // gemm
  int32_t tile_n, cluster;

  std::string text() const {
    return words(op, in_place ? " in place" : "", base ? " base" : "", base_scale ? " scaled" : "", bias ? " bias" : "",
                 " ", lrk::name_of(dtype), "/", lrk::name_of(factor_dtype), " T=", T, " N=", N, " R=", R,
                 n_contig ? " U[R,N]" : " U[N,R]", " pad=", pad, " shift=", shift, " dropout=", p,
                 op == "gemm" ? words(" K=", K, " tiles of ", cluster, " x 128 x ", tile_n) : "");
  }
};

Case draw_case() {
  Case c{};
  c.op = draw_op({"shrink", "expand", "expand", "wgrad", "shrink_wgrad", "rescale"});
  std::tie(c.dtype, c.factor_dtype) = draw_types();
  c.T = pick({1, 3, 16, 64, 65, 100, 130});
  c.N = pick({1, 8, 24, 64, 100, 130, 256, 257, 520});
  c.R = static_cast<int32_t>(pick({1, 2, 4, 8, 8, 16, 16, 17, 40, 72}));
  if (c.op == "wgrad" || c.op == "shrink_wgrad") {
    if (draw() % 4 == 0) c.T = pick({128, 129, 600}), c.N = std::min<int64_t>(c.N, 100);  // more than one split
    if (c.op == "shrink_wgrad") c.R = std::min(c.R, 16);
  }
  c.n_contig = c.op != "shrink_wgrad" && draw() % 2;
  c.pad = pick({0, 0, 8, 3});
  c.shift = pick({0, 0, 0, 1, 8});
  c.p = draw() % 3 == 0 && c.op != "shrink_wgrad" ? 0.3 : 0.0;
  c.scale = static_cast<float>(pick({1, 2, 3})) * 0.75f;
  c.base = draw() % 4 != 0;
  if (c.op == "expand") {
    c.in_place = c.base && draw() % 2;
    c.base_scale = c.base && draw() % 2;
    c.bias = draw() % 2;
  }
  if (c.op == "gemm") {
    while (c.dtype == DType::kF32) std::tie(c.dtype, c.factor_dtype) = draw_types();
    c.T = pick({1, 64, 100, 130, 300});
    c.N = pick({8, 64, 200, 264});
    c.K = pick({8, 64, 72, 200, 320});
    c.R = c.R == 1 && draw() % 2 ? 0 : c.R;
    c.pad = pick({0, 8});
    c.shift = 0;
    c.p = c.n_contig && c.p > 0 ? c.p : 0;
    c.base = c.p == 0 && draw() % 4 == 0;
    c.base_scale = c.p == 0 && draw() % 4 == 0;
    c.bias = draw() % 2;
    c.tile_n = static_cast<int32_t>(pick({128, 256}));
    c.cluster = static_cast<int32_t>(pick({1, 2}));
  }
  return c;
}

// Y = c X W + bias + D(S U), and X W by itself. n_contig: W and U run along N, as in backward.
std::string judge_gemm(const Case& c, const std::vector<int>& schedules) {
  const bool two_terms = c.factor_dtype != DType::kBF16;
  Matrix x(c.dtype, c.T, c.K, c.pad, 0, true),
      w(c.dtype, c.n_contig ? c.K : c.N, c.n_contig ? c.N : c.K, c.pad, 0, true);
  Matrix s(s_dtype(c.factor_dtype), c.T, c.R, 0, 0, true);
  Matrix u(c.factor_dtype, c.n_contig ? c.R : c.N, c.n_contig ? c.N : c.R, 0, 0, true);
  Matrix y(c.dtype, c.T, c.N, 0, 0, false), base(c.dtype, c.T, c.N, 0, 0, false), bias(c.dtype, 1, c.N, 0, 0, true);
  Matrix scale(DType::kF32, 1, c.N, 0, 0, true);
  const int64_t seed = 0x1234567890abcdef;
  emu::track_global(&seed, sizeof seed, true);
  LoraGemmParams p{.y = y.data(),
                   .base = c.base ? base.data() : nullptr,
                   .base_scale = c.base_scale ? scale.floats() : nullptr,
                   .bias = c.bias ? bias.data() : nullptr,
                   .x = x.data(),
                   .w = {w.data(), c.n_contig ? w.pitch : 1, c.n_contig ? 1 : w.pitch},
                   .s = s.data(),
                   .u = {u.data(), c.n_contig ? c.N : 1, c.n_contig ? 1 : c.R},
                   .T = c.T,
                   .N = c.N,
                   .K = c.K,
                   .x_pitch = x.pitch,
                   .R = c.R,
                   .dtype = c.dtype,
                   .factor_dtype = c.factor_dtype,
                   .dropout = make_dropout(c.p),
                   .seed = &seed};
  const size_t bytes = lora_gemm_workspace(p, {Device::kCUDA, 90});
  Matrix scratch(DType::kBF16, 1, static_cast<int64_t>(bytes / 2), 0, 0, false);
  const std::string wrong = run_schedules(schedules, {&y, &base, &scratch}, {y, base}, [&] {
    GemmTail tail{};
    int code = c.R ? lora_tail(p, bytes ? scratch.data() : nullptr, nullptr, &tail) : 0;
    return code ? code : lora_gemm_sm90(p, tail, gemm_tiles(c.T, c.N, c.tile_n, c.cluster), nullptr);
  });
  if (!wrong.empty()) return wrong;
  Error error;
  for (int64_t t = 0; t < c.T; ++t)
    for (int64_t n = 0; n < c.N; ++n) {
      double product = 0, low = 0, magnitude = 0;
      for (int64_t k = 0; k < c.K; ++k) {
        const double v = x.at(t, k) * (c.n_contig ? w.at(k, n) : w.at(n, k));
        product += v, magnitude += std::fabs(v);
      }
      if (c.base) error.add(base.at(t, n), product, magnitude, c.dtype, false);
      const double factor = c.base_scale ? scale.at(0, n) : 1.0;
      magnitude *= std::fabs(factor);
      const Philox block = dropout_block(static_cast<uint64_t>(seed), t, n / kDropoutBlock);
      const bool keep = bits16(block, static_cast<int>(n % kDropoutBlock)) >= p.dropout.threshold;
      for (int64_t r = 0; keep && r < c.R; ++r) {
        const double v = s.at(t, r) * (c.n_contig ? u.at(r, n) : u.at(n, r)) * p.dropout.keep_scale;
        low += v, magnitude += std::fabs(v);
      }
      const double add = c.bias ? bias.at(0, n) : 0.0;
      error.add(y.at(t, n), factor * product + low + add, magnitude + std::fabs(add), c.dtype, two_terms);
    }
  return error.verdict();
}

std::string judge(const Case& c, const std::vector<int>& schedules) {
  if (c.op == "gemm") return judge_gemm(c, schedules);
  const DType s_type = s_dtype(c.factor_dtype);
  const bool exact = c.dtype == c.factor_dtype, mixed = !exact || c.factor_dtype != s_type;  // mixed: two bf16 terms
  Matrix x(c.dtype, c.T, c.N, c.pad, c.shift, true);
  Matrix u(c.factor_dtype, c.n_contig ? c.R : c.N, c.n_contig ? c.N : c.R, 0, c.shift, true);
  Matrix s_in(s_type, c.T, c.R, 0, 0, true);
  Matrix s_out(s_type, c.T, c.R, 0, 0, false);
  Matrix g(c.factor_dtype, c.n_contig ? c.R : c.N, c.n_contig ? c.N : c.R, 0, 0, false);
  Matrix out(c.dtype, c.T, c.N, c.op == "expand" ? c.pad : 0, 0, false), bias(c.dtype, 1, c.N, 0, 0, true);
  Matrix base_scale(DType::kF32, 1, c.N, 0, 0, true), dc(DType::kF32, 1, c.N, 0, 0, false);
  Matrix base(c.dtype, c.T, c.N, c.pad, 0, true);  // rescale; expand adds to x
  const int64_t seed = 0x1234567890abcdef;
  emu::track_global(&seed, sizeof seed, true);
  const Factor factor{u.data(), c.n_contig ? c.N : 1, c.n_contig ? 1 : c.R};
  const Dropout dropout = make_dropout(c.p);

  Matrix& y = c.in_place ? x : out;
  const LoraShrinkParams shrink{.x = x.data(),
                                .u = factor,
                                .s = s_out.data(),
                                .T = c.T,
                                .N = c.N,
                                .x_pitch = x.pitch,
                                .R = c.R,
                                .dtype = c.dtype,
                                .factor_dtype = c.factor_dtype,
                                .scale = c.scale,
                                .dropout = dropout,
                                .seed = &seed};
  const LoraExpandParams expand{.y = y.data(),
                                .base = c.base ? x.data() : nullptr,
                                .base_scale = c.base_scale ? base_scale.floats() : nullptr,
                                .bias = c.bias ? bias.data() : nullptr,
                                .s = s_in.data(),
                                .u = factor,
                                .T = c.T,
                                .N = c.N,
                                .y_pitch = y.pitch,
                                .base_pitch = x.pitch,
                                .R = c.R,
                                .dtype = c.dtype,
                                .factor_dtype = c.factor_dtype,
                                .scale = c.scale,
                                .dropout = dropout,
                                .seed = &seed};
  const LoraRescaleParams rescale{.dy = x.data(),
                                  .base = c.base ? base.data() : nullptr,
                                  .base_scale = base_scale.floats(),
                                  .dz = out.data(),
                                  .dc = c.base ? dc.floats() : nullptr,
                                  .T = c.T,
                                  .N = c.N,
                                  .dy_pitch = x.pitch,
                                  .base_pitch = base.pitch,
                                  .dtype = c.dtype};
  const LoraWgradParams wgrad{.s = s_in.data(),
                              .x = x.data(),
                              .g = g.data(),
                              .g_stride_r = factor.stride_r,
                              .g_stride_n = factor.stride_n,
                              .T = c.T,
                              .N = c.N,
                              .x_pitch = x.pitch,
                              .R = c.R,
                              .dtype = c.dtype,
                              .factor_dtype = c.factor_dtype,
                              .scale = c.scale,
                              .dropout = dropout,
                              .seed = &seed};
  const LoraShrinkWgradParams both{.shrink = shrink, .wgrad = wgrad};
  const auto run = [&](const auto& p, auto workspace_of, auto call) {
    const size_t bytes = workspace_of(p, kTarget);
    Matrix scratch(DType::kF32, 1, static_cast<int64_t>(bytes / 4), 0, 0, false);
    return run_schedules(schedules, {&x, &s_out, &g, &out, &dc, &scratch}, {x, s_out, g, out, dc},
                         [&] { return call(p, bytes ? scratch.data() : nullptr, nullptr); });
  };
  const std::string wrong = c.op == "shrink"    ? run(shrink, lora_shrink_workspace, lora_shrink_cuda)
                            : c.op == "expand"  ? run(expand, lora_expand_workspace, lora_expand_cuda)
                            : c.op == "wgrad"   ? run(wgrad, lora_wgrad_workspace, lora_wgrad_cuda)
                            : c.op == "rescale" ? run(rescale, lora_rescale_workspace, lora_rescale_cuda)
                                                : run(both, lora_shrink_wgrad_workspace, lora_shrink_wgrad_cuda);
  if (!wrong.empty()) return wrong;

  std::vector<double> kept(static_cast<size_t>(c.T * c.N));  // D(1)
  for (int64_t t = 0; t < c.T; ++t)
    for (int64_t n = 0; n < c.N; ++n) {
      const Philox block = dropout_block(static_cast<uint64_t>(seed), t, n / kDropoutBlock);
      const bool keep = bits16(block, static_cast<int>(n % kDropoutBlock)) >= dropout.threshold;
      kept[static_cast<size_t>(t * c.N + n)] = keep ? dropout.keep_scale : 0.0;
    }
  const auto mask = [&](int64_t t, int64_t n) { return kept[static_cast<size_t>(t * c.N + n)]; };
  const auto u_at = [&](int64_t r, int64_t n) { return c.n_contig ? u.at(r, n) : u.at(n, r); };
  Error error;
  if (c.op == "shrink" || c.op == "shrink_wgrad") {
    for (int64_t t = 0; t < c.T; ++t)
      for (int64_t r = 0; r < c.R; ++r) {
        double sum = 0, magnitude = 0;
        for (int64_t n = 0; n < c.N; ++n) {
          const double v = mask(t, n) * x.fresh_at(t, n) * u_at(r, n);
          sum += v, magnitude += std::fabs(v);
        }
        error.add(s_out.at(t, r), c.scale * sum, c.scale * magnitude, s_type, c.op == "shrink" ? !exact : mixed);
      }
  }
  if (c.op == "wgrad" || c.op == "shrink_wgrad") {
    for (int64_t r = 0; r < c.R; ++r)
      for (int64_t n = 0; n < c.N; ++n) {
        double sum = 0, magnitude = 0;
        for (int64_t t = 0; t < c.T; ++t) {
          const double v = mask(t, n) * x.fresh_at(t, n) * s_in.at(t, r);
          sum += v, magnitude += std::fabs(v);
        }
        error.add(c.n_contig ? g.at(r, n) : g.at(n, r), c.scale * sum, c.scale * magnitude, c.factor_dtype, mixed);
      }
  }
  if (c.op == "expand") {
    for (int64_t t = 0; t < c.T; ++t)
      for (int64_t n = 0; n < c.N; ++n) {
        double sum = 0, magnitude = 0;
        for (int64_t r = 0; r < c.R; ++r) {
          const double v = mask(t, n) * s_in.at(t, r) * u_at(r, n);
          sum += v, magnitude += std::fabs(v);
        }
        double add = c.base ? x.fresh_at(t, n) * (c.base_scale ? base_scale.at(0, n) : 1.0) : 0.0;
        if (c.bias) add += bias.at(0, n);
        error.add(y.at(t, n), add + c.scale * sum, std::fabs(add) + 1 + c.scale * magnitude, c.dtype, mixed);
      }
  }
  if (c.op == "rescale") {
    for (int64_t n = 0; n < c.N; ++n) {
      double sum = 0, magnitude = 0;
      for (int64_t t = 0; t < c.T; ++t) {
        const double v = x.fresh_at(t, n) * base.at(t, n);
        sum += v, magnitude += std::fabs(v);
        error.add(out.at(t, n), x.fresh_at(t, n) * base_scale.at(0, n), 1, c.dtype, false);
      }
      if (c.base) error.add(dc.at(0, n), sum, magnitude, DType::kF32, false);
    }
  }
  if (!x.padding_untouched() || !out.padding_untouched() || (!c.in_place && x.bytes != x.fresh))
    return "wrote where it should only read";
  return error.verdict();
}

// Rows far apart.
void huge(int& code, Error& error) {
  const int64_t pitch = (int64_t{1} << 31) + 8, T = 2, N = 40;
  const int32_t R = 3;
  const DType b = DType::kBF16;
  bf16 *x = reserve(2 * pitch + N), *u = reserve(2 * pitch + N);
  std::vector<bf16> s(T * R);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t n = 0; n < N; ++n) store(b, x, t * pitch + n, draw_value());
  for (int64_t r = 0; r < R; ++r)
    for (int64_t n = 0; n < N; ++n) store(b, u, r * pitch + n, draw_value());
  const Factor factor{.data = u, .stride_r = pitch, .stride_n = 1};
  const LoraShrinkParams shrink{.x = x,
                                .u = factor,
                                .s = s.data(),
                                .T = T,
                                .N = N,
                                .x_pitch = pitch,
                                .R = R,
                                .dtype = b,
                                .factor_dtype = b,
                                .scale = 1.f,
                                .dropout = {},
                                .seed = nullptr};
  const LoraExpandParams expand{.y = x,
                                .base = x,
                                .base_scale = nullptr,
                                .bias = nullptr,
                                .s = s.data(),
                                .u = factor,
                                .T = T,
                                .N = N,
                                .y_pitch = pitch,
                                .base_pitch = pitch,
                                .R = R,
                                .dtype = b,
                                .factor_dtype = b,
                                .scale = 1.f,
                                .dropout = {},
                                .seed = nullptr};
  const LoraWgradParams wgrad{.s = s.data(),
                              .x = x,
                              .g = u,
                              .g_stride_r = pitch,
                              .g_stride_n = 1,
                              .T = T,
                              .N = N,
                              .x_pitch = pitch,
                              .R = R,
                              .dtype = b,
                              .factor_dtype = b,
                              .scale = 1.f,
                              .dropout = {},
                              .seed = nullptr};
  const auto x_at = [&](int64_t t, int64_t n) { return load(b, x, t * pitch + n); };
  const auto u_at = [&](int64_t r, int64_t n) { return load(b, u, r * pitch + n); };
  const auto s_at = [&](int64_t t, int64_t r) { return load(b, s.data(), t * R + r); };
  std::vector<float> scratch(lora_shrink_workspace(shrink, kTarget) / 4);
  code = lora_shrink_cuda(shrink, scratch.data(), nullptr);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t r = 0; r < R; ++r) {
      double sum = 0;
      for (int64_t n = 0; n < N; ++n) sum += x_at(t, n) * u_at(r, n);
      error.add(s_at(t, r), sum, N, b, false);
    }
  std::vector<double> want;
  for (int64_t t = 0; t < T; ++t)
    for (int64_t n = 0; n < N; ++n) {
      want.push_back(x_at(t, n));
      for (int64_t r = 0; r < R; ++r) want.back() += s_at(t, r) * u_at(r, n);
    }
  code |= lora_expand_cuda(expand, nullptr, nullptr);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t n = 0; n < N; ++n) error.add(x_at(t, n), want[static_cast<size_t>(t * N + n)], N, b, false);
  code |= lora_wgrad_cuda(wgrad, nullptr, nullptr);
  for (int64_t r = 0; r < R; ++r)
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int64_t t = 0; t < T; ++t) sum += x_at(t, n) * s_at(t, r);
      error.add(u_at(r, n), sum, 10, b, false);
    }
}

}  // namespace

int main(int argc, char** argv) { return lrk::run_program(argc, argv, draw_case, judge, huge); }
