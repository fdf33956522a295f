// SPDX-License-Identifier: Apache-2.0
// wgmma in every form that ptx_sm90.cuh has, and copies of boxes by every swizzle, against plain loops. A program for the
// device (nvcc, sm_90a) and for the emulator: a line per form, "ok" or how many elements are off, exit status 1 if any.
#include <string>

#include "launch_sm90.cuh"
#include "memory.h"

namespace lrk {

// A [64, 16] and B [N, 16] as their descriptors want them, in shared memory, or A in registers.
template <class T, int kN, Major kA, Major kB, Swizzle kSwizzle, bool kRegisters>
__global__ void __launch_bounds__(128) product(const T* a, const T* b, float* d) {
  Smem smem;
  unsigned char* as = smem.take<unsigned char>(16384);  // up to 64 rows of 128 bytes, or 16 of K with 64 rows each
  unsigned char* bs = smem.take<unsigned char>(32768);
  const auto t = static_cast<uint32_t>(threadIdx.x);
  constexpr uint32_t kSpan = span_of(kSwizzle), kBrick = 8 * kSpan;
  constexpr bool kPlain = kSwizzle == Swizzle::kNone;
  // K-major: bricks of 8 rows follow each other, without a swizzle two of them a step of K. MN-major: both halves of K of a
  // span of rows, then the next span.
  const auto describe = [](const void* p, Major major) {
    const uint32_t start = shared_address(p);
    if (major == Major::kK) return MatrixDescriptor{start, kPlain ? 128 : 16, kPlain ? 256 : kBrick, kSwizzle};
    return kPlain ? MatrixDescriptor{start, 128, 256, kSwizzle} : MatrixDescriptor{start, 2 * kBrick, kBrick, kSwizzle};
  };
  const MatrixDescriptor of_a = describe(as, kA), of_b = describe(bs, kB);
  for (uint32_t i = t; i < 64 * 16; i += 128)
    *reinterpret_cast<T*>(as + (address_of(of_a, i / 16, i % 16, kA) - of_a.start)) = a[i];
  for (uint32_t i = t; i < kN * 16; i += 128)
    *reinterpret_cast<T*>(bs + (address_of(of_b, i / 16, i % 16, kB) - of_b.start)) = b[i];
  fence_async();
  sync_threads();
  uint32_t fragment[4];
  const uint32_t row = t / 32 * 16 + t % 32 / 4, k = t % 4 * 2;
  for (uint32_t i = 0; i < 4; ++i)
    fragment[i] = *reinterpret_cast<const uint32_t*>(a + (row + 8 * (i % 2)) * 16 + k + 8 * (i / 2));
  float sum[kN / 2];
  for (int i = 0; i < kN / 2; ++i) sum[i] = static_cast<float>(i);
  wgmma_fence(sum);
  for (const bool add : {false, true}) {  // the first forgets what is there
    if constexpr (kRegisters) {
      wgmma<T, kN, kB>(sum, fragment, packed(of_b), add);
    } else {
      wgmma<T, kN, kA, kB>(sum, packed(of_a), packed(of_b), add);
    }
  }
  wgmma_commit();
  wgmma_wait<0>(sum);
  for (uint32_t i = 0; i < kN / 2; ++i) d[(row + i / 2 % 2 * 8) * kN + i / 4 * 8 + k + i % 2] = sum[i];
}

// A box of 8 rows and one span, from (x, y) of [12, 100] 16-bit elements; as it lies in shared memory; stored to another place.
struct Boxes {
  TensorMap from, to;
  uint16_t* seen;
  int x, y;
};
template <Swizzle kSwizzle>
__global__ void __launch_bounds__(32) boxes(const __grid_constant__ Boxes p) {
  Smem smem;
  uint16_t* tile = smem.take<uint16_t>(512);
  Mbarrier* landed = smem.take<Mbarrier>(1);
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    prefetch_map(p.from);
    mbarrier_init(landed, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(landed, 8 * span_of(kSwizzle));
    bulk_load(tile, p.from, landed, p.x, p.y);
  }
  sync_warp();
  mbarrier_wait(landed, 0);
  for (int i = t; i < 512; i += 32) p.seen[i] = i < static_cast<int>(4 * span_of(kSwizzle)) ? tile[i] : uint16_t{0};
  if (t == 0) {
    bulk_store(p.to, tile, p.x + 3, p.y - 1);
    bulk_commit();
    bulk_wait_read<0>();
  }
}

// Each block of a cluster loads its box, one below the other, for all of them, and signals the next one.
template <int kBlocks>
__global__ void __launch_bounds__(32) cluster(const __grid_constant__ Boxes p) {
  Smem smem;
  uint16_t* tile = smem.take<uint16_t>(kBlocks * 512);
  Mbarrier *landed = smem.take<Mbarrier>(1), *signalled = smem.take<Mbarrier>(1);
  const int t = static_cast<int>(threadIdx.x), rank = cluster_rank();
  if (t == 0) {
    mbarrier_init(landed, 1);
    mbarrier_init(signalled, 1);
    fence_mbarrier_init();
  }
  sync_cluster();
  if (t == 0) {
    mbarrier_arrive_expect(landed, kBlocks * 1024);
    bulk_load_multicast(tile + rank * 512, p.from, landed, p.x, p.y + 8 * rank, (1 << kBlocks) - 1);
    mbarrier_arrive_at(signalled, (rank + 1) % kBlocks);
  }
  mbarrier_wait(landed, 0);
  mbarrier_wait(signalled, 0);
  for (int i = t; i < kBlocks * 512; i += 32) p.seen[rank * kBlocks * 512 + i] = tile[i];
}

// What the launch before has written is there after the wait.
__global__ void __launch_bounds__(32) earlier(int* p) {
  launch_dependents();
  p[threadIdx.x] = static_cast<int>(threadIdx.x);
}
__global__ void __launch_bounds__(32) later(const int* p, int* out) {
  wait_predecessor();
  out[threadIdx.x] = p[threadIdx.x] + 1;
}

namespace {

int g_faults = 0;
void said(const std::string& what, int code, int wrong) {
  g_faults += code || wrong;
  if (code) {
    std::printf("%s: error %d\n", what.c_str(), code);
  } else if (wrong) {
    std::printf("%s: %d elements are off\n", what.c_str(), wrong);
  } else {
    std::printf("%s ok\n", what.c_str());
  }
}

template <class T, int kN, Major kA, Major kB, Swizzle kSwizzle, bool kRegisters>
void try_product() {
  T *a = visible<T>(64 * 16), *b = visible<T>(kN * 16);
  float* d = visible<float>(64 * kN);
  for (int i = 0; i < 64 * 16; ++i) a[i] = from_float<T>(static_cast<float>((i * 37 + i / 16) % 17 - 8));
  for (int i = 0; i < kN * 16; ++i) b[i] = from_float<T>(static_cast<float>((i * 29 + i / 16 * 3) % 13 - 6));
  for (int i = 0; i < 64 * kN; ++i) d[i] = -1.f;
  const int code = finished(launch("product", product<T, kN, kA, kB, kSwizzle, kRegisters>, dim3(1), dim3(128),
                                   size_t{16384 + 32768}, nullptr, a, b, d));
  int wrong = 0;
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < kN; ++j) {
      float want = 0;
      for (int k = 0; k < 16; ++k) want += 2 * to_float(a[i * 16 + k]) * to_float(b[j * 16 + k]);
      wrong += d[i * kN + j] != want;
    }
  const auto letter = [](Major m) { return m == Major::kK ? "k" : "mn"; };
  said(std::string("wgmma ") + (std::is_same_v<T, bf16> ? "bf16" : "f16") + " N " + std::to_string(kN) + " swizzle " +
           std::to_string(span_of(kSwizzle)) + (kRegisters ? " a in registers" : std::string(" a ") + letter(kA)) +
           " b " + letter(kB),
       code, wrong);
}

template <class T, int kN, Swizzle kSwizzle>
void try_majors() {
  constexpr Major K = Major::kK, MN = Major::kMN;
  try_product<T, kN, K, K, kSwizzle, false>();
  try_product<T, kN, K, K, kSwizzle, true>();
  if constexpr (kN * 2 >= span_of(kSwizzle)) {  // an MN-major B is a span wide at least
    try_product<T, kN, MN, K, kSwizzle, false>();
    try_product<T, kN, K, MN, kSwizzle, false>();
    try_product<T, kN, MN, MN, kSwizzle, false>();
    try_product<T, kN, K, MN, kSwizzle, true>();
  }
}

template <Swizzle kSwizzle>
void try_boxes() {
  constexpr int kRows = 12, kCols = 100, kPitch = 104, kWide = static_cast<int>(span_of(kSwizzle)) / 2;
  for (const auto& [x, y] : {std::pair{8, 2}, {-5, -3}, {90, 9}, {200, 0}, {3, -8}}) {
    auto *from = visible<uint16_t>(kRows * kPitch), *to = visible<uint16_t>(kRows * kPitch),
         *seen = visible<uint16_t>(512);
    for (int i = 0; i < kRows * kPitch; ++i) from[i] = static_cast<uint16_t>(i + 1);
    Boxes p{{}, {}, seen, x, y};
    const auto box = [&](void* base) {
      return TensorBox{base, 2, 2, {kCols, kRows}, {kPitch * 2}, {kWide, 8}, kSwizzle};
    };
    int code = make_tensor_map(&p.from, box(from));
    if (!code) code = make_tensor_map(&p.to, box(to));
    if (!code) code = finished(launch("boxes", boxes<kSwizzle>, dim3(1), dim3(32), size_t{1024 + 128}, nullptr, p));
    const auto at = [&](int r, int c) {
      return r >= 0 && r < kRows && c >= 0 && c < kCols ? from[r * kPitch + c] : uint16_t{0};
    };
    int wrong = 0;
    for (int r = 0; r < 8; ++r)
      for (int c = 0; c < kWide; ++c) {
        const uint32_t place = swizzled(static_cast<uint32_t>(r * kWide + c) * 2, kSwizzle) / 2;
        wrong += seen[place] != at(y + r, x + c);
      }
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kPitch; ++c) {
        const int br = r - (y - 1), bc = c - (x + 3);
        const bool stored = br >= 0 && br < 8 && bc >= 0 && bc < kWide && c < kCols;
        wrong += to[r * kPitch + c] != (stored ? at(y + br, x + bc) : uint16_t{0xffff});
      }
    said("box at " + std::to_string(x) + ", " + std::to_string(y) + " swizzle " + std::to_string(span_of(kSwizzle)),
         code, wrong);
  }
}

template <int kBlocks>
void try_cluster() {
  constexpr int kRows = 8 * kBlocks - 3, kCols = 64, kEach = kBlocks * 512;
  auto *from = visible<uint16_t>(kRows * kCols), *seen = visible<uint16_t>(kBlocks * kEach);
  for (int i = 0; i < kRows * kCols; ++i) from[i] = static_cast<uint16_t>(i + 1);
  Boxes p{{}, {}, seen, 0, 0};
  int code = make_tensor_map(&p.from, {from, 2, 2, {kCols, kRows}, {kCols * 2}, {64, 8}, Swizzle::kNone});
  if (!code)
    code = finished(launch("cluster", cluster<kBlocks>, dim3(kBlocks), dim3(32),
                           smem_bytes<uint16_t>(kEach) + 2 * smem_bytes<Mbarrier>(1), nullptr, {kBlocks}, p));
  int wrong = 0;
  for (int i = 0; i < kBlocks * kEach; ++i) wrong += seen[i] != (i % kEach < kRows * kCols ? from[i % kEach] : 0);
  said("cluster of " + std::to_string(kBlocks), code, wrong);
}

void try_overlap() {
  int *p = visible<int>(32), *out = visible<int>(32);
  int code = launch("earlier", earlier, dim3(1), dim3(32), 0, nullptr, p);
  if (!code) code = finished(launch("later", later, dim3(1), dim3(32), 0, nullptr, {1, true}, p, out));
  int wrong = 0;
  for (int i = 0; i < 32; ++i) wrong += out[i] != i + 1;
  said("overlapping launches", code, wrong);
}

}  // namespace
}  // namespace lrk

int main() {
  using namespace lrk;
  try_majors<bf16, 8, Swizzle::kNone>();
  try_majors<bf16, 16, Swizzle::k32>();
  try_majors<bf16, 32, Swizzle::k64>();
  try_majors<bf16, 64, Swizzle::k128>();
  try_majors<bf16, 128, Swizzle::k128>();
  try_majors<bf16, 256, Swizzle::k128>();
  try_majors<bf16, 256, Swizzle::kNone>();
  try_majors<bf16, 8, Swizzle::k128>();
  try_majors<f16, 64, Swizzle::k128>();
  try_majors<f16, 16, Swizzle::kNone>();
  try_boxes<Swizzle::kNone>();
  try_boxes<Swizzle::k32>();
  try_boxes<Swizzle::k64>();
  try_boxes<Swizzle::k128>();
  try_cluster<1>();
  try_cluster<2>();
  try_cluster<8>();
  try_overlap();
  return g_faults != 0;
}
