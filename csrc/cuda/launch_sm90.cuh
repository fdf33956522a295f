// SPDX-License-Identifier: Apache-2.0
// What launchers of sm_90a kernels need beside launch.cuh: tensor maps, made by the driver. The driver is asked for the
// function when it is first wanted, never linked: the library loads where there is none.
#pragma once

#include "launch.cuh"
#include "ptx_sm90.cuh"

#if !defined(LRK_EMULATE)

#include <cuda.h>

namespace lrk {

// A cudaError_t value: cudaErrorInvalidValue where refusal_of(t) says why, cudaErrorNotSupported where the driver is older.
inline int make_tensor_map(TensorMap* map, const TensorBox& t) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) cudaGetLastError();
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(error == cudaSuccess ? found : nullptr);
  }();
  if (refusal_of(t)) return cudaErrorInvalidValue;
  if (!encode) return cudaErrorNotSupported;
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap));
  CUtensorMap made;
  const CUtensorMapDataType type = t.item == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : t.item == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  cuuint64_t sizes[kMaxMapRank] = {}, pitches[kMaxMapRank - 1] = {};
  cuuint32_t box[kMaxMapRank] = {}, steps[kMaxMapRank] = {1, 1, 1};
  for (int i = 0; i < t.rank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(t.size[i]);
    box[i] = static_cast<cuuint32_t>(t.box[i]);
    if (i > 0) pitches[i - 1] = static_cast<cuuint64_t>(t.pitch[i - 1]);
  }
  const CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                         CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  const CUresult result =
      encode(&made, type, static_cast<cuuint32_t>(t.rank), const_cast<void*>(t.base), sizes, pitches, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[static_cast<int>(t.swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;
  __builtin_memcpy(map, &made, sizeof made);
  return cudaSuccess;
}

}  // namespace lrk

#endif
