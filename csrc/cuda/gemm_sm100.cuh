// SPDX-License-Identifier: Apache-2.0
// What CUTLASS' collectives for sm_100a lack for a low rank: a K of two segments, y = [x, s] [w, u]^T in one accumulator. For
// files that are compiled for sm_100a alone; CUTLASS reaches the hardware by itself, so that nothing here is emulated.
#pragma once

#include <cute/tensor.hpp>
// before the rest, which calls its algorithms by their full names
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

namespace lrk {

// A collective whose first steps along K are Main's and whose last are Tail's, of 16-bit floats. A step of both has rows of 128
// bytes (64 elements of 16 bits, 128 of 8, 256 of 4), so that Tail's lie in Main's stages as they are. The kernel is told of a K of
// whole steps; both have their true ones in their tensor maps, and what lies past them is zeros.
template <class Main, class Tail>
struct Segments : Main {
  using MainloopPipeline = typename Main::MainloopPipeline;
  using State = typename Main::MainloopPipelineState;
  using Cluster = typename Main::DispatchPolicy::ClusterShape;
  using Stored = typename Main::TensorStorage;
  using StoredTail = typename Tail::TensorStorage;  // A's stages, then B's, as in Stored
  static constexpr bool kScaled = requires { Main::SFVecSize; };
  static constexpr int kStep = cute::size<2>(typename Main::TileShape{});
  static constexpr int kTailStep = cute::size<2>(typename Tail::TileShape{});
  static_assert(sizeof(StoredTail::smem_A) == sizeof(Stored::smem_A));
  static_assert(sizeof(StoredTail::smem_B) == sizeof(Stored::smem_B));
  static_assert(cute::is_same_v<MainloopPipeline, typename Tail::MainloopPipeline>, "as many stages");
  static_assert(cute::is_static_v<Cluster>);
  // What a step of the tail moves beyond one of Main: elements of 4 bits beside 8 count as packed.
  static constexpr uint32_t kMore = [] {
    if constexpr (kScaled) return Tail::TmaTransactionBytes - Main::ABTmaTransactionBytes;
    return 0u;
  }();

  struct Arguments {
    typename Main::Arguments main;
    typename Tail::Arguments tail;
    int K, R;
  };
  struct Params {
    typename Main::Params main;
    typename Tail::Params tail;
    int steps;  // of Main
  };

  static int whole(int K, int R) { return (cute::ceil_div(K, kStep) + cute::ceil_div(R, kTailStep)) * kStep; }
  template <class Shape>
  static auto of_k(Shape const& shape, int K) {
    return cute::make_shape(cute::get<0>(shape), cute::get<1>(shape), K, 1);
  }
  template <class Shape>
  static bool can_implement(Shape const& shape, Arguments const& a) {
    return cute::get<2>(shape) == whole(a.K, a.R) && Main::can_implement(of_k(shape, a.K), a.main) &&
           (!a.R || Tail::can_implement(of_k(shape, a.R), a.tail));
  }
  template <class Shape>
  static Params to_underlying_arguments(Shape const& shape, Arguments const& a, void* workspace,
                                        cutlass::KernelHardwareInfo const& hardware = {}) {
    Params p{
        Main::to_underlying_arguments(of_k(shape, a.K), a.main, workspace, hardware), {}, cute::ceil_div(a.K, kStep)};
    if (a.R) p.tail = Tail::to_underlying_arguments(of_k(shape, a.R), a.tail, workspace, hardware);
    return p;
  }

  CUTLASS_DEVICE Segments(Params const& p, Cluster cluster, uint32_t rank)
      : Main(p.main, cluster, rank), tail_(p.tail, cluster, rank), p_(p) {}

  template <class K, class OfMain, class OfTail>
  struct Inputs {
    K k_tiles;
    OfMain main;
    OfTail tail;
  };
  template <class Shape>
  CUTLASS_DEVICE auto load_init(Shape const& shape, Stored& stored) const {
    const auto main = Main::load_init(shape, stored);
    const auto tail = tail_.load_init(shape, reinterpret_cast<StoredTail&>(stored));
    return Inputs<decltype(main.k_tiles), decltype(main), decltype(tail)>{main.k_tiles, main, tail};
  }

  // Steps of the tail move as many bytes as the barrier is told of: scales of Main's first step beside them, which nothing reads.
  template <class Inputs, class Coord, class Iterator>
  CUTLASS_DEVICE auto load(MainloopPipeline pipeline, State state, Inputs const& in, Coord const& at, Iterator k,
                           int count) {
    using namespace cute;
    const int first = *k, of_main = max(0, min(count, p_.steps - first));
    if (of_main) state = get<0>(Main::load(pipeline, state, in.main, at, k, of_main));
    const auto [unused, a, b, to_a, to_b, mask_a, mask_b] = in.tail;
    const int m = get<0>(at) / size(typename Main::TiledMma::AtomThrID{}), n = get<1>(at);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int i = of_main; i < count; ++i, ++state) {
      pipeline.producer_acquire(state);
      auto* barrier = pipeline.producer_get_barrier(state);
      const int step = first + i - p_.steps, stage = state.index();
      if (elect_one_sync()) {
        if (kMore) cutlass::arch::ClusterTransactionBarrier::expect_transaction(barrier, kMore);
        copy(p_.tail.tma_load_a.with(*barrier, mask_a), a(_, m, step, 0), to_a(_, stage));
        copy(p_.tail.tma_load_b.with(*barrier, mask_b), b(_, n, step, 0), to_b(_, stage));
        if constexpr (kScaled) {
          const auto& s = in.main;
          copy(p_.main.tma_load_sfa.with(*barrier, s.mcast_mask_sfa), s.tAgSFA_mkl(_, m, 0, 0), s.tAsSFA(_, stage));
          copy(p_.main.tma_load_sfb.with(*barrier, s.mcast_mask_sfb), s.tBgSFB_nkl(_, n, 0, 0), s.tBsSFB(_, stage));
        }
      }
    }
    k.coord = first + count;
    return make_tuple(state, k);
  }

  template <class OfMain, class OfTail>
  struct Operands {
    OfMain main;
    OfTail tail;
  };
  template <class Tmem>
  CUTLASS_DEVICE auto mma_init(Tmem tmem, Stored& stored) const {
    const auto main = Main::mma_init(tmem, stored);
    const auto tail = tail_.mma_init(tmem, reinterpret_cast<StoredTail&>(stored));
    return Operands<decltype(main), decltype(tail)>{main, tail};
  }

  template <class Pipelines, class States, class Accumulators, class Operands, class Coord>
  CUTLASS_DEVICE auto mma(Pipelines pipelines, States states, Accumulators const& sums, Operands const& operands,
                          Coord at, int count) {
    using namespace cute;
    State state = Main::mma(pipelines, states, sums, operands.main, at, p_.steps);
    auto pipeline = get<0>(pipelines);
    auto sum = get<0>(sums);
    auto [tiled, a, b] = operands.tail;
    tiled.accumulate_ = UMMA::ScaleOut::One;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int i = p_.steps; i < count; ++i, ++state) {
      pipeline.consumer_wait(state);
      CUTLASS_PRAGMA_UNROLL
      for (int block = 0; block < size<2>(a); ++block)
        gemm(tiled, a(_, _, block, state.index()), b(_, _, block, state.index()), sum);
      pipeline.consumer_release(state);
    }
    return state;
  }

 private:
  Tail tail_;
  Params const& p_;
};

}  // namespace lrk
