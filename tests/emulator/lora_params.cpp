// SPDX-License-Identifier: Apache-2.0
// Runs every launcher of csrc/lora.h at params level over the emulator, with neither torch nor Python in the process, and
// compares with sums in double; results must have equal bits under every schedule tried.
//
//   lora_params CASES SEED SCHEDULE...     random cases; a line for each that fails
//   lora_params huge                       pitches of more than 2^31 elements
#include <sys/mman.h>

#include <tuple>

#include "lora.h"
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
  bool in_place, base, base_scale, bias;  // expand: what the product is added to; rescale: base is for dc

  std::string text() const {
    char s[256];
    std::snprintf(s, sizeof s, "%s%s%s%s%s %s/%s T=%lld N=%lld R=%d %s pad=%lld shift=%lld dropout=%g", op.c_str(),
                  in_place ? " in place" : "", base ? " base" : "", base_scale ? " scaled" : "", bias ? " bias" : "",
                  lrk::name_of(dtype), lrk::name_of(factor_dtype), static_cast<long long>(T), static_cast<long long>(N),
                  R, n_contig ? "U[R,N]" : "U[N,R]", static_cast<long long>(pad), static_cast<long long>(shift), p);
    return s;
  }
};

Case draw_case() {
  const std::pair<DType, DType> types[] = {{DType::kF32, DType::kF32},
                                           {DType::kF16, DType::kF16},
                                           {DType::kBF16, DType::kBF16},
                                           {DType::kF16, DType::kF32},
                                           {DType::kBF16, DType::kF32}};
  const char* ops[] = {"shrink", "expand", "expand", "wgrad", "shrink_wgrad", "rescale"};
  Case c{};
  c.op = ops[draw() % 6];
  std::tie(c.dtype, c.factor_dtype) = types[draw() % 5];
  c.T = pick({1, 3, 16, 64, 65, 100, 130});
  c.N = pick({1, 8, 24, 64, 100, 130, 256, 257, 520});
  c.R = static_cast<int32_t>(pick({1, 2, 4, 8, 8, 16, 16, 17, 40, 72}));
  if (c.op == "wgrad" || c.op == "shrink_wgrad") {
    if (draw() % 4 == 0) c.T = pick({512, 513, 600}), c.N = std::min<int64_t>(c.N, 100);  // more than one split
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
  return c;
}

bool run_case(const Case& c, const std::vector<int>& schedules) {
  emu::forget_global();
  const bool mixed = c.dtype != c.factor_dtype;
  Matrix x(c.dtype, c.T, c.N, c.pad, c.shift, true);
  Matrix u(c.factor_dtype, c.n_contig ? c.R : c.N, c.n_contig ? c.N : c.R, 0, c.shift, true);
  Matrix s_in(c.factor_dtype, c.T, c.R, 0, 0, true);
  Matrix s_out(c.factor_dtype, c.T, c.R, 0, 0, false);
  Matrix g(c.factor_dtype, c.n_contig ? c.R : c.N, c.n_contig ? c.N : c.R, 0, 0, false);
  Matrix out(c.dtype, c.T, c.N, c.op == "expand" ? c.pad : 0, 0, false), bias(c.dtype, 1, c.N, 0, 0, true);
  Matrix base_scale(DType::kF32, 1, c.N, 0, 0, true), dc(DType::kF32, 1, c.N, 0, 0, false);
  Matrix base(c.dtype, c.T, c.N, c.pad, 0, true);  // rescale; expand adds to x
  const int64_t seed = 0x1234567890abcdef;
  emu::track_global(&seed, sizeof seed, true);
  const Factor factor{u.data(), c.n_contig ? c.N : 1, c.n_contig ? 1 : c.R};
  const Dropout dropout = make_dropout(c.p);

  const LoraShrinkParams shrink{x.data(), factor,  s_out.data(),   c.T,     c.N,     x.pitch,
                                c.R,      c.dtype, c.factor_dtype, c.scale, dropout, &seed};
  Matrix& y = c.in_place ? x : out;
  const LoraExpandParams expand{y.data(),
                                c.base ? x.data() : nullptr,
                                c.base_scale ? static_cast<float*>(base_scale.data()) : nullptr,
                                c.bias ? bias.data() : nullptr,
                                s_in.data(),
                                factor,
                                c.T,
                                c.N,
                                y.pitch,
                                x.pitch,
                                c.R,
                                c.dtype,
                                c.factor_dtype,
                                c.scale,
                                dropout,
                                &seed};
  const LoraRescaleParams rescale{x.data(),
                                  c.base ? base.data() : nullptr,
                                  static_cast<float*>(base_scale.data()),
                                  out.data(),
                                  c.base ? static_cast<float*>(dc.data()) : nullptr,
                                  c.T,
                                  c.N,
                                  x.pitch,
                                  base.pitch,
                                  c.dtype};
  const LoraWgradParams wgrad{s_in.data(),
                              x.data(),
                              g.data(),
                              c.n_contig ? c.N : 1,
                              c.n_contig ? 1 : c.R,
                              c.T,
                              c.N,
                              x.pitch,
                              c.R,
                              c.dtype,
                              c.factor_dtype,
                              c.scale,
                              dropout,
                              &seed};
  const LoraShrinkWgradParams both{shrink, wgrad};
  const bool is_shrink = c.op == "shrink" || c.op == "shrink_wgrad",
             is_wgrad = c.op == "wgrad" || c.op == "shrink_wgrad";

  size_t bytes = 0;
  if (c.op == "shrink") bytes = lora_shrink_workspace(shrink, kTarget);
  if (c.op == "expand") bytes = lora_expand_workspace(expand, kTarget);
  if (c.op == "wgrad") bytes = lora_wgrad_workspace(wgrad, kTarget);
  if (c.op == "shrink_wgrad") bytes = lora_shrink_wgrad_workspace(both, kTarget);
  if (c.op == "rescale") bytes = lora_rescale_workspace(rescale, kTarget);
  Matrix scratch(DType::kF32, 1, static_cast<int64_t>(bytes / 4) + (bytes == 0), 0, 0, false);
  void* workspace = bytes ? scratch.data() : nullptr;

  std::vector<unsigned char> first;
  for (int schedule : schedules) {
    lrk_emulator_set("schedule", schedule);
    for (Matrix* m : {&x, &s_out, &g, &out, &dc, &scratch}) m->bytes = m->fresh;
    const int code = c.op == "shrink"    ? lora_shrink_cuda(shrink, workspace, nullptr)
                     : c.op == "expand"  ? lora_expand_cuda(expand, workspace, nullptr)
                     : c.op == "wgrad"   ? lora_wgrad_cuda(wgrad, workspace, nullptr)
                     : c.op == "rescale" ? lora_rescale_cuda(rescale, workspace, nullptr)
                                         : lora_shrink_wgrad_cuda(both, workspace, nullptr);
    if (code) {
      std::printf("FAIL %s: the launch returned %d\n", c.text().c_str(), code);
      return false;
    }
    std::vector<unsigned char> now;
    for (Matrix* m : {&x, &s_out, &g, &out, &dc}) now.insert(now.end(), m->bytes.begin(), m->bytes.end());
    if (first.empty()) first = now;
    if (first != now) {
      std::printf("FAIL %s: schedule %d gives other bits than schedule %d\n", c.text().c_str(), schedule, schedules[0]);
      return false;
    }
  }

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
  if (is_shrink) {
    for (int64_t t = 0; t < c.T; ++t)
      for (int64_t r = 0; r < c.R; ++r) {
        double sum = 0, magnitude = 0;
        for (int64_t n = 0; n < c.N; ++n) {
          const double v = mask(t, n) * x.fresh_at(t, n) * u_at(r, n);
          sum += v, magnitude += std::fabs(v);
        }
        error.add(s_out.at(t, r), c.scale * sum, c.scale * magnitude, c.factor_dtype, mixed);
      }
  }
  if (is_wgrad) {
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
  if (!(error.worst <= 1.0)) {
    std::printf("FAIL %s: the error is %.3g times its bound\n", c.text().c_str(), error.worst);
    return false;
  }
  if (!x.padding_untouched() || !out.padding_untouched() || (!c.in_place && x.bytes != x.fresh)) {
    std::printf("FAIL %s: wrote where it should only read\n", c.text().c_str());
    return false;
  }
  return true;
}

// Three rows far apart in memory that is reserved and mostly never touched.
bool run_huge() {
  const int64_t pitch = (int64_t{1} << 31) + 8, T = 2, N = 40;
  const int32_t R = 3;
  const size_t bytes = static_cast<size_t>((2 * pitch + N) * 2);
  const auto reserve = [&] {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      std::printf("SKIP no address space for 2^31 elements\n");
      std::exit(0);
    }
    return static_cast<bf16*>(p);
  };
  bf16 *x = reserve(), *u = reserve();
  std::vector<bf16> s(T * R);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t n = 0; n < N; ++n) store(DType::kBF16, x, t * pitch + n, draw_value());
  for (int64_t r = 0; r < R; ++r)
    for (int64_t n = 0; n < N; ++n) store(DType::kBF16, u, r * pitch + n, draw_value());
  const Factor factor{u, pitch, 1};
  const DType b = DType::kBF16;
  const auto x_at = [&](int64_t t, int64_t n) { return static_cast<double>(to_float(x[t * pitch + n])); };
  Error error;
  const LoraShrinkParams shrink{x, factor, s.data(), T, N, pitch, R, b, b, 1.f, {}, nullptr};
  std::vector<float> scratch(lora_shrink_workspace(shrink, kTarget) / 4);
  int code = lora_shrink_cuda(shrink, scratch.data(), nullptr);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t r = 0; r < R; ++r) {
      double sum = 0;
      for (int64_t n = 0; n < N; ++n) sum += x_at(t, n) * to_float(u[r * pitch + n]);
      error.add(to_float(s[static_cast<size_t>(t * R + r)]), sum, N, b, false);
    }
  std::vector<double> before;
  for (int64_t t = 0; t < T; ++t)
    for (int64_t n = 0; n < N; ++n) before.push_back(x_at(t, n));
  code |= lora_expand_cuda({x, x, nullptr, nullptr, s.data(), factor, T, N, pitch, pitch, R, b, b, 1.f, {}, nullptr},
                           nullptr, nullptr);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t n = 0; n < N; ++n) {
      double sum = before[static_cast<size_t>(t * N + n)];
      for (int64_t r = 0; r < R; ++r)
        sum += static_cast<double>(to_float(s[static_cast<size_t>(t * R + r)])) * to_float(u[r * pitch + n]);
      error.add(x_at(t, n), sum, N, b, false);
    }
  code |= lora_wgrad_cuda({s.data(), x, u, pitch, 1, T, N, pitch, R, b, b, 1.f, {}, nullptr}, nullptr, nullptr);
  for (int64_t r = 0; r < R; ++r)
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int64_t t = 0; t < T; ++t) sum += x_at(t, n) * to_float(s[static_cast<size_t>(t * R + r)]);
      error.add(to_float(u[r * pitch + n]), sum, 10, b, false);
    }
  munmap(x, bytes);
  munmap(u, bytes);
  const bool ok = code == 0 && error.worst <= 1.0;
  std::printf("%s huge pitches: code %d, error %.3g of its bound\n", ok ? "ok" : "FAIL", code, error.worst);
  return ok;
}

}  // namespace

int main(int argc, char** argv) {
  return lrk::run_program(
      argc, argv, [](const std::vector<int>& schedules) { return run_case(draw_case(), schedules); }, run_huge);
}
