// SPDX-License-Identifier: Apache-2.0
// The MX family: MXFP4 (OCP Microscaling Formats 1.0), its codecs and the contract of its kernels. T rows, K features, O rows of
// a weight, G = ceil(K / 32) blocks of a row. Row pitches are in elements; the last dimension is contiguous unless a stride says so.
//
//   e2m1   4 bits: a sign and 0, .5, 1, 1.5, 2, 3, 4, 6. No inf, no NaN. The even k is the low nibble
//   e8m0   8 bits b: 2^(b - 127); 0x00 is 2^-127, 0xFF is NaN
//   block  32 elements along K and one e8m0: 4.25 bits an element; those past K are zeros
//
// and NVFP4, a codec: blocks of 16 whose scales are e4m3, and one fp32 scale of the whole (below).
//
// A block with a NaN or an infinity has the scale 0xFF and codes 0: it is NaN as a whole. One of zeros has the scale 0x00 and
// codes 0, as one of which the rule asks for a scale below 2^-127. Beyond 6 scales an element saturates.
#pragma once

#include <cmath>

#include "multi_lora.h"

namespace lrk {

constexpr int kMxBlock = 32, kMxBytes = kMxBlock / 2;

// ---- elements

// A sign, an exponent and a bit of mantissa are those of a float but for the bias.
LRK_HD float e2m1_value(uint32_t code) { return bit_cast<float>((code & 7u) << 22 | (code & 8u) << 28) * 0x1p126f; }
// To the nearest, ties to the even code, saturating; a NaN gives 0.
LRK_HD uint32_t e2m1_magnitude(float magnitude) {
  return (magnitude > .25f) + (magnitude >= .75f) + (magnitude > 1.25f) + (magnitude >= 1.75f) + (magnitude > 2.5f) +
         (magnitude >= 3.5f) + (magnitude > 5.f);
}
LRK_HD uint32_t e2m1_code(float x) { return e2m1_magnitude(fabsf(x)) | (bit_cast<uint32_t>(x) >> 28 & 8u); }
// One of the two neighbours, the upper one with the probability of the distance to the lower one, by 16 random bits.
LRK_HD uint32_t e2m1_stochastic(float x, uint32_t bits) {
  const float a = fabsf(x);
  const uint32_t low = (a >= .5f) + (a >= 1.f) + (a >= 1.5f) + (a >= 2.f) + (a >= 3.f) + (a >= 4.f) + (a >= 6.f);
  const float step = low < 4u ? 2.f : low < 6u ? 1.f : .5f;  // one over the distance of the neighbours
  const float part = (a - e2m1_value(low)) * step * 65536.f;
  const uint32_t up = low < 7u && static_cast<float>(bits) + .5f < part;
  return (low + up) | (bit_cast<uint32_t>(x) >> 28 & 8u);
}

// ---- scales

LRK_HD float e8m0_value(uint32_t byte) {
  return bit_cast<float>(byte == 0u ? 0x00400000u : byte == 255u ? 0x7fc00000u : byte << 23);
}
// One over it, exact; of NaN it is 0, so that all codes become 0.
LRK_HD float e8m0_inverse(uint32_t byte) {
  return bit_cast<float>(byte == 254u ? 0x00400000u : byte == 255u ? 0u : (254u - byte) << 23);
}

// How a block gets its scale. Of the largest magnitude m: kFloor 2^(floor(log2 m) - 2) (OCP), kCeil 2^(ceil(log2 m) - 2), kRceil
// 2^ceil(log2(m / 6)), kEven m rounded to one bit of mantissa and then as kFloor. Of the root mean square s (Quartet, arXiv
// 2505.14669): kQuest 2^floor(log2(0.487079 s + 1e-8)) as published, kQuestNearest the same to the nearest power, by its logarithm.
enum class MxRule : int32_t { kFloor = 0, kRceil = 1, kCeil = 2, kEven = 3, kQuest = 4, kQuestNearest = 5 };
constexpr int kMxRules = 6;
constexpr bool is_quest(MxRule rule) { return rule == MxRule::kQuest || rule == MxRule::kQuestNearest; }

LRK_HD uint32_t clamped_scale(int32_t byte) { return static_cast<uint32_t>(byte < 0 ? 0 : byte > 254 ? 254 : byte); }
// Of m, or for a quest rule s; 0xFF where it is not finite.
LRK_HD uint32_t mx_scale(MxRule rule, float of) {
  float x = of;
  if (is_quest(rule)) x = fmaf(0.487079f, of, 1e-8f);  // one rounding on every device
  if (rule == MxRule::kRceil) x = of / 6.f;
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bit_cast<uint32_t>(of) & 0x7f800000u) == 0x7f800000u) return 255u;
  if (of == 0.f) return 0u;
  const auto field = [](uint32_t b) { return static_cast<int32_t>(b >> 23); };
  switch (rule) {
    case MxRule::kRceil: return clamped_scale(field(bits + 0x7fffffu));
    case MxRule::kCeil: return clamped_scale(field(bits + 0x7fffffu) - 2);
    case MxRule::kEven: return clamped_scale(field(bits + 0x200000u) - 2);
    case MxRule::kQuest: return clamped_scale(field(bits));
    case MxRule::kQuestNearest: return clamped_scale(field(bits + (0x800000u - 0x3504f3u)));  // from sqrt(2) on
    default: return clamped_scale(field(bits) - 2);
  }
}

// ---- what a quantiser does to a block before it has a scale

// y = H x / sqrt(32) of 32 values, H the Hadamard matrix of Sylvester's order, x with signs of its own: bit i of `signs` turns
// x[i]. Sums in fp32 in the order of the butterfly.
LRK_HD void hadamard32(float (&v)[kMxBlock], uint32_t signs) {
  for (int i = 0; i < kMxBlock; ++i) v[i] = bit_cast<float>(bit_cast<uint32_t>(v[i]) ^ (signs >> i & 1u) << 31);
  for (int h = 1; h < kMxBlock; h *= 2)
    for (int i = 0; i < kMxBlock; ++i)
      if (!(i & h)) {
        const float a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
  for (int i = 0; i < kMxBlock; ++i) v[i] *= 0.17677669529663687f;
}
// 16 bits for stochastic rounding of element (row, column): the stream of dropout with another tag.
LRK_HD Philox mx_counter(int64_t row, int64_t col_block) {
  return Philox{{static_cast<uint32_t>(col_block), static_cast<uint32_t>(row), 0u,
                 stream_tag(Method::kMx, Distribution::kBits16)}};
}
LRK_HD Philox mx_random(uint64_t seed, int64_t row, int64_t col_block) {
  return philox4x32(mx_counter(row, col_block), seed);
}

// ---- NVFP4: x = code (e2m1) * scale (e4m3, of 16 elements) * global (fp32)
//
//   e4m3    a sign, 4 bits of exponent (bias 7) and 3 of mantissa: up to 448. No inf; 0x7f is NaN
//   global  amax / (448 * 6), at least 2^-120, so that no factor below leaves the range of normal floats
//   scale   (largest magnitude of the block / 6) / global within [2^-6, 448]: never 0, so that a block of zeros has 2^-6
//
// An amax that is not finite makes the whole NaN; a block with a NaN or an infinity has the scale 0x7f and codes 0.

constexpr int kNvBlock = 16, kNvBytes = kNvBlock / 2;

LRK_HD float e4m3_value(uint32_t code) {
  const float magnitude =
      (code & 0x7fu) == 0x7fu ? bit_cast<float>(0x7fc00000u) : bit_cast<float>((code & 0x7fu) << 20) * 0x1p120f;
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | (code & 0x80u) << 24);
}
// To the nearest, ties to even, saturating.
LRK_HD uint32_t e4m3_code(float x) {
  const uint32_t u = bit_cast<uint32_t>(x), sign = u >> 24 & 0x80u, mag = u & 0x7fffffffu;
  if (mag >= 0x43e00000u) return sign | (mag > 0x7f800000u ? 0x7fu : 0x7eu);  // from 448 on
  if (mag < 0x3c800000u)  // below 2^-6: 2^14 leaves the grid of 2^-9 of the subnormals in the low mantissa bits
    return sign | (bit_cast<uint32_t>(bit_cast<float>(mag) + 0x1p14f) - 0x46800000u);
  return sign | (mag - 0x3c000000u + 0x7ffffu + (mag >> 20 & 1u)) >> 20;
}

LRK_HD bool is_finite(float x) { return (bit_cast<uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }
LRK_HD float nvfp4_global(float amax) {
  const float scale = amax / 2688.f;
  return !is_finite(amax) ? bit_cast<float>(0x7fc00000u) : scale > 0x1p-120f ? scale : 0x1p-120f;
}
// Of a tensor whose elements lie in [least, most]; NaN where one of them is.
LRK_HD float nvfp4_global(float least, float most) {
  const float a = fabsf(least), b = fabsf(most);
  return nvfp4_global(a != a || a > b ? a : b);
}
LRK_HD uint32_t nvfp4_scale(float largest, float global) {
  const float scale = largest / 6.f / global;
  if (!is_finite(largest) || !is_finite(global)) return 0x7fu;
  return e4m3_code(scale < 0x1p-6f ? 0x1p-6f : scale);
}
// What an element is multiplied by: one over its scale, of one over the global one; of NaN it is 0, so that all codes become 0.
LRK_HD float nvfp4_inverse(uint32_t scale, float over_global) {
  return scale == 0x7fu ? 0.f : over_global / e4m3_value(scale);
}

// ---- the Blackwell layout of scales (tcgen05, cuBLAS): byte of row r and block g of a [R, G] matrix, padded to 128 by 4

LRK_HD constexpr int64_t swizzled_bytes(int64_t R, int64_t G) {
  return ceil_div(R, int64_t{128}) * ceil_div(G, int64_t{4}) * 512;
}
LRK_HD constexpr int64_t swizzled_scale(int64_t r, int64_t g, int64_t G) {
  return (r / 128 * ceil_div(G, int64_t{4}) + g / 4) * 512 + r % 32 * 16 + r % 128 / 32 * 4 + g % 4;
}

// ---- kernels

struct MxQuantizeParams {
  const void* x;         // [T, K] dtype at strides (x_row, x_column)
  uint8_t* codes;        // [T, G, 16]
  uint8_t* scales;       // [T, G]
  int32_t* mask;         // [T, G], bit i: element i of the block is within 6 scales; or null
  const int64_t* seed;   // [1] for stochastic rounding, or null
  const int32_t* signs;  // [1] of the Hadamard transform, or null for none turned
  int64_t T, K, x_row, x_column;
  float gain;  // elements are multiplied by it before they are rounded
  MxRule rule;
  bool hadamard;
  DType dtype;
};

struct MxDequantizeParams {
  const uint8_t* codes;   // [T, G, 16], rows at `pitch` bytes
  const uint8_t* scales;  // [T, G], rows at scale_pitch
  void* y;                // [T, columns] dtype: blocks first.. of each row
  int64_t T, columns, pitch, scale_pitch, y_pitch;
  DType dtype;
};

struct Nvfp4QuantizeParams {
  const void* x;              // [T, K] dtype at strides (x_row, x_column)
  uint8_t* codes;             // [T, G, 8], G of blocks of 16
  uint8_t* scales;            // [T, G] e4m3
  float* global;              // [1]
  const float *least, *most;  // [1] each: amax is the larger of their magnitudes
  const int64_t* seed;        // [1] for stochastic rounding, or null
  int64_t T, K, x_row, x_column;
  DType dtype;
};

struct Nvfp4DequantizeParams {
  const uint8_t* codes;   // [T, G, 8], contiguous
  const uint8_t* scales;  // [T, G]
  const float* global;    // [1]
  void* y;                // [T, K] dtype, contiguous
  int64_t T, K;
  DType dtype;
};

// A packed weight [O, K].
struct MxWeight {
  const uint8_t* codes;   // [O, G, 16]
  const uint8_t* scales;  // [O, G]
  int64_t O, K;
  LRK_HD constexpr int64_t G() const { return ceil_div(K, int64_t{kMxBlock}); }
};

// Y[T, O] = X[T, K] W^T + bias + S[T, R] B^T of few rows, one accumulator, rounded once.
struct MxLinearParams {
  MxWeight w;
  const void* x;     // [T, K] dtype
  void* y;           // [T, O] dtype, contiguous
  const void* bias;  // [O] dtype, or null
  const void* s;     // [T, R] s_dtype(b_dtype), contiguous, or null
  const void* b;     // [O, R] b_dtype, contiguous
  int64_t T, x_pitch;
  int32_t R;
  DType dtype, b_dtype;
};
// The same where each row has a weight, bias and B of its own, one of E: those of expert e lie behind those of e - 1. A row's
// bits are those of the row alone. Without an expert it is zeros, with one that does not exist (CUDA) NaN.
struct MxExpertsParams {
  MxLinearParams of;    // of expert 0; its T rows may be more than few
  const int32_t* plan;  // [plan_layout(T, E).length], rows by expert
  int64_t E;
};
// dX[T, K] = dY[T, O] W of few rows.
struct MxLinearDxParams {
  MxWeight w;
  const void* dy;  // [T, O] dtype
  void* dx;        // [T, K] dtype, contiguous
  int64_t T, dy_pitch;
  DType dtype;
};

// Y[T, O] = alpha (A B^T + S U^T) + bias of two packed operands, one accumulator, rounded once to bf16: for units that multiply
// blocks by their scales. B is MXFP4; so is A, or where it is wide MXFP8.
struct MxProductParams {
  const uint8_t *a, *a_scales;  // [T, G, 16] e2m1, or [T, G, 32] e4m3; [T, G]
  const uint8_t *b, *b_scales;  // [O, G, 16]; [O, G]
  void* y;                      // [T, O] bf16
  const void* bias;             // [O] bf16, or null
  const void *s, *u;            // [T, R] and [O, R] bf16, contiguous
  int64_t T, O, K;              // K is 32 G
  int32_t R;
  bool wide;
  float alpha;
  constexpr int64_t G() const { return K / kMxBlock; }
};
// Whether an architecture has a kernel for it. Nothing of it was run on a GPU yet, so that it is taken where LRKERN_FUSED asks for it
// alone: `pays` is a count.
struct MxProductShape {
  int64_t T, O, K;
  int32_t R;
  bool wide;
  DType dtype;   // of y
  bool aligned;  // operands begin at multiples of 16 bytes
};
struct MxProductConfig {
  bool fits, pays;
  const char* why;
};
MxProductConfig choose_mx_product(const MxProductShape& shape, Target target);
constexpr int64_t kMxProductTile = 128,
                  kMxProductSide = kMxProductTile * 65535;  // of T and of O; so many tiles a grid has

// Numbers of a type as sums of so many bf16, exactly: what CUDA multiplies codes with.
LRK_HD constexpr int mx_terms(DType dtype) { return dtype == DType::kBF16 ? 1 : dtype == DType::kF16 ? 2 : 3; }

// Rows of x up to which codes are decoded in registers (kMxFewHalves: on a CPU with products of 16-bit floats, for those);
// beyond them W is decoded in panels of so many rows, for dx of so many columns, whole blocks, for ATen's GEMM. A row's bits do
// not depend on the others of few, but that on a CPU with AVX2 one alone is summed in an order of its own.
constexpr int kMxFewCpu = 32, kMxFewHalves = 8, kMxFewCuda = 16;
// `widens`: 16-bit x meets them in fp32, rounded once behind the GEMM.
struct MxWay {
  bool few, few_dx, widens;
  int64_t rows, columns;
};
MxWay choose_mx_way(int64_t T, int64_t O, int64_t K, DType dtype, Target target);

// Rows that each have one of E experts. `few`, CUDA alone: one launch over the tiles of the plan, `rows` of an expert at a time,
// which asks the device for nothing. Else each expert's rows are multiplied as so many rows of one weight are.
constexpr int64_t kMxExpertRows = 1024;
struct MxExpertsWay {
  bool few;
  int32_t rows;  // 8 or 16: how often W is read, and no bits
};
MxExpertsWay choose_mx_experts_way(int64_t T, int64_t E, Target target);

// mx_linear by kernels for one architecture, whose products and low-rank product have one accumulator. Few rows: blocks of kMxTile
// rows of W take a part of K each, so many steps of kMxStep features, and the parts are added in order, which T has no part in.
// More: tiles of gemm.h, of W's rows by x's. Taken as GemmConfig says.
constexpr int kMxTile = 128, kMxStep = 512, kMxMostSteps = 4;
constexpr int64_t kMaxMxParts = 64;
struct MxFusedShape {
  int64_t T, O, K;
  int32_t R;
  DType dtype, b_dtype;
  bool aligned;  // rows of x, and y's, are whole vectors of 16 bytes
};
struct MxFused {
  bool fits = false, pays = false, few = false;
  int32_t parts = 0, steps = 0;     // of few
  int32_t tile_n = 0, cluster = 0;  // of more
  const char* why;
};
MxFused choose_mx_fused(const MxFusedShape& shape, Target target);
MxFusedShape shape_of(const MxLinearParams& p);
LowRankProduct low_rank_of(const MxLinearParams& p);

LRK_KERNEL(mx_quantize, MxQuantizeParams)
LRK_KERNEL(mx_dequantize, MxDequantizeParams)
LRK_KERNEL(nvfp4_quantize, Nvfp4QuantizeParams)
LRK_KERNEL(nvfp4_dequantize, Nvfp4DequantizeParams)
LRK_KERNEL(mx_linear, MxLinearParams)
LRK_KERNEL(mx_fused, MxLinearParams)  // not of the CPU
// On CUDA alone: on the CPU each expert's rows are taken together.
size_t mx_linear_experts_workspace(const MxExpertsParams& p, Target target);
int mx_linear_experts_cuda(const MxExpertsParams& p, void* workspace, Stream stream);
LRK_KERNEL(mx_product, MxProductParams)  // not of the CPU
// What comes first, into its scratch memory: the scales of A, then of B, swizzled.
int mx_swizzle_cuda(const MxProductParams& p, void* workspace, Stream stream);
// On the CPU alone: CUDA makes dX of few rows from panels too.
size_t mx_linear_dx_workspace(const MxLinearDxParams& p, Target target);
void mx_linear_dx_cpu(const MxLinearDxParams& p, void* workspace);

}  // namespace lrk
