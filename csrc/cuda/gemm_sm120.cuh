// SPDX-License-Identifier: Apache-2.0
// As gemm_sm100.cuh over CUTLASS' block-scaled collective for sm_120a, whose products are mma.sync: the tail's operands lie in
// Main's stages, come by ldmatrix and are multiplied into the same registers. For files that are compiled for sm_120a alone.
#pragma once

#include <cute/tensor.hpp>
// before the rest, which calls its algorithms by their full names
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

namespace lrk {

// The product of bf16 whose sums lie in the registers that one of another type has them in.
template <class>
struct Bf16Product;
template <class Atom, class Threads, class M, class N, class K>
struct Bf16Product<cute::TiledMMA<Atom, Threads, cute::Tile<M, N, K>>> {
  using type =
      cute::TiledMMA<cute::MMA_Atom<cute::SM80_16x8x16_F32BF16BF16F32_TN>, Threads, cute::Tile<M, N, cute::_16>>;
};

template <class Main>
struct ScaledSegments : Main {
  using Element = cutlass::bfloat16_t;
  using MainloopPipeline = typename Main::MainloopPipeline;
  using State = typename Main::PipelineState;
  using Stored = typename Main::TensorStorage;
  using Tile = typename Main::TileShape;
  using Product = typename Bf16Product<typename Main::TiledMma>::type;
  static constexpr int kStages = Main::DispatchPolicy::Stages, kStep = cute::size<2>(Tile{});
  static constexpr int kRow =
      kStep * cute::sizeof_bits_v<typename Main::SmemAllocTypeA> / 8;  // bytes of a step, in A as in B
  static constexpr int kTailStep = kRow / static_cast<int>(sizeof(Element));
  static_assert(kRow == 64 || kRow == 128);
  using Atom = cute::conditional_t<kRow == 128, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                   cute::GMMA::Layout_K_SW64_Atom<Element>>;
  template <int kMode>
  using Stages = decltype(cute::tile_to_shape(
      Atom{}, cute::make_shape(cute::shape<kMode>(Tile{}), cute::Int<kTailStep>{}, cute::Int<kStages>{})));
  static_assert(sizeof(Element) * cute::cosize_v<Stages<0>> == sizeof(Stored::smem_A));
  static_assert(sizeof(Element) * cute::cosize_v<Stages<1>> == sizeof(Stored::smem_B));
  static_assert(
      cute::is_same_v<decltype(Product{}.get_layoutC_TV()), decltype(typename Main::TiledMma{}.get_layoutC_TV())>);
  template <int kMode>
  static auto boxes(Element const* of, int rows, int R, int64_t pitch) {
    using namespace cute;
    const auto matrix = make_tensor(make_gmem_ptr(of), make_shape(rows, R), make_stride(pitch, _1{}));
    return make_tma_copy(SM90_TMA_LOAD{}, matrix, Stages<kMode>{}(_, _, _0{}),
                         make_shape(cute::shape<kMode>(Tile{}), Int<kTailStep>{}), _1{});
  }
  static constexpr uint32_t kMore =
      sizeof(Element) * (cute::cosize_v<Stages<0>> + cute::cosize_v<Stages<1>>) / kStages -
      kStep *
          (cute::size<0>(Tile{}) * cute::sizeof_bits_v<typename Main::ElementA> +
           cute::size<1>(Tile{}) * cute::sizeof_bits_v<typename Main::ElementB>) /
          8;

  struct TailArguments {
    Element const *ptr_A, *ptr_B;  // s [M, R] and u [N, R]
    cute::Stride<int64_t, cute::_1, int64_t> dA, dB;
  };
  struct Arguments {
    typename Main::Arguments main;
    TailArguments tail;
    int K, R;
  };
  struct Params {
    typename Main::Params main;
    decltype(boxes<0>(nullptr, 0, 0, 0)) load_s;
    decltype(boxes<1>(nullptr, 0, 0, 0)) load_u;
    int steps, R;  // steps of Main
    uint32_t tma_transaction_bytes = Main::TmaTransactionBytes;
  };

  static int whole(int K, int R) { return (cute::ceil_div(K, kStep) + cute::ceil_div(R, kTailStep)) * kStep; }
  template <class Shape>
  static auto of_k(Shape const& shape, int K) {
    return cute::make_shape(cute::get<0>(shape), cute::get<1>(shape), K, 1);
  }
  template <class Shape>
  static bool can_implement(Shape const& shape, Arguments const& a) {
    return cute::get<2>(shape) == whole(a.K, a.R) && Main::can_implement(of_k(shape, a.K), a.main) && a.R % 8 == 0 &&
           cute::get<0>(a.tail.dA) % 8 == 0 && cute::get<0>(a.tail.dB) % 8 == 0;
  }
  template <class Shape>
  static Params to_underlying_arguments(Shape const& shape, Arguments const& a, void* workspace) {
    Params p{
        Main::to_underlying_arguments(of_k(shape, a.K), a.main, workspace), {}, {}, cute::ceil_div(a.K, kStep), a.R};
    if (a.R) {
      p.load_s = boxes<0>(a.tail.ptr_A, cute::get<0>(shape), a.R, cute::get<0>(a.tail.dA));
      p.load_u = boxes<1>(a.tail.ptr_B, cute::get<1>(shape), a.R, cute::get<0>(a.tail.dB));
    }
    return p;
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(Params const& p) {
    Main::prefetch_tma_descriptors(p.main);
    if (!p.R) return;
    cute::prefetch_tma_descriptor(p.load_s.get_tma_descriptor());
    cute::prefetch_tma_descriptor(p.load_u.get_tma_descriptor());
  }
  // The kernel looks at the first two.
  template <class Problem>
  CUTLASS_DEVICE auto load_init(Problem const& problem, Params const& p) const {
    using namespace cute;
    const auto main = Main::load_init(problem, p.main);
    const auto tiles = [&](auto const& boxes, int rows, auto tile) {  // [tile, kTailStep, tiles, steps]
      return local_tile(boxes.get_tma_tensor(make_shape(rows, p.R)), make_shape(tile, Int<kTailStep>{}),
                        make_coord(_, _));
    };
    return make_tuple(get<0>(main), get<1>(main), main, tiles(p.load_s, get<0>(problem), shape<0>(Tile{})),
                      tiles(p.load_u, get<1>(problem), shape<1>(Tile{})));
  }

  template <int kMode>
  CUTLASS_DEVICE static auto stages(Stored& stored) {
    auto* first = kMode ? reinterpret_cast<Element*>(&stored.smem_B) : reinterpret_cast<Element*>(&stored.smem_A);
    return cute::make_tensor(cute::make_smem_ptr(first), Stages<kMode>{});
  }

  // Steps of the tail move as many bytes as the barrier is told of: scales of Main's first step beside them, which nothing reads.
  template <class Inputs, class Coord, class Iterator>
  CUTLASS_DEVICE void load(Params const& p, MainloopPipeline pipeline, State state, Inputs const& in, Coord const& at,
                           Iterator k, int count, int thread, uint32_t rank, Stored& stored) {
    using namespace cute;
    const auto main = get<2>(in);
    Main::load(p.main, pipeline, state, main, at, k, p.steps, thread, rank, stored);
    state.advance(p.steps);
    if (elect_one_sync()) {
      const int m = get<0>(at), n = get<1>(at);
      const auto copier = [&](auto const& boxes, auto const& from, auto const& to) {
        return
            [&boxes, s = boxes.get_slice(0).partition_S(from), d = boxes.get_slice(0).partition_D(to)](
                auto& barrier, int step, int stage) { copy(boxes.with(barrier), s(_, _, _, step), d(_, _, _, stage)); };
      };
      const auto load_s = copier(p.load_s, get<3>(in)(_, _, m, _), stages<0>(stored));
      const auto load_u = copier(p.load_u, get<4>(in)(_, _, n, _), stages<1>(stored));
      const auto load_sfa = copier(p.main.tma_load_sfa, get<2>(main)(_, _, m, _, 0),
                                   make_tensor(make_smem_ptr(stored.smem_SFA.begin()), typename Main::SmemLayoutSFA{}));
      const auto load_sfb = copier(p.main.tma_load_sfb, get<3>(main)(_, _, n, _, 0),
                                   make_tensor(make_smem_ptr(stored.smem_SFB.begin()), typename Main::SmemLayoutSFB{}));
      CUTLASS_PRAGMA_NO_UNROLL
      for (int i = p.steps; i < count; ++i, ++state) {
        pipeline.producer_acquire(state);
        auto* barrier = pipeline.producer_get_barrier(state);
        if (kMore) cutlass::arch::ClusterTransactionBarrier::expect_transaction(barrier, kMore);
        load_s(*barrier, i - p.steps, state.index());
        load_u(*barrier, i - p.steps, state.index());
        load_sfa(*barrier, 0, state.index());
        load_sfb(*barrier, 0, state.index());
      }
    }
    __syncwarp();
  }

  template <class Sums>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, State state, Sums& sums, int count, int thread, Stored& stored,
                          Params const& p) {
    using namespace cute;
    Main::mma(pipeline, state, sums, p.steps, thread, stored, p.main);
    state.advance(p.steps);
    Product product;
    const auto mine = product.get_thread_slice(thread);
    const auto s = stages<0>(stored);
    const auto u = stages<1>(stored);
    auto a = mine.partition_fragment_A(s(_, _, _0{}));
    auto b = mine.partition_fragment_B(u(_, _, _0{}));
    using Load = Copy_Atom<SM75_U32x4_LDSM_N, Element>;
    const auto copy_a = make_tiled_copy_A(Load{}, product);
    const auto copy_b = make_tiled_copy_B(Load{}, product);
    const auto from_a = copy_a.get_thread_slice(thread).partition_S(as_position_independent_swizzle_tensor(s));
    const auto from_b = copy_b.get_thread_slice(thread).partition_S(as_position_independent_swizzle_tensor(u));
    auto to_a = copy_a.get_thread_slice(thread).retile_D(a);
    auto to_b = copy_b.get_thread_slice(thread).retile_D(b);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int i = p.steps; i < count; ++i, ++state) {
      pipeline.consumer_wait(state);
      CUTLASS_PRAGMA_UNROLL
      for (int block = 0; block < size<2>(a); ++block) {
        copy(copy_a, from_a(_, _, block, state.index()), to_a(_, _, block));
        copy(copy_b, from_b(_, _, block, state.index()), to_b(_, _, block));
        gemm(product, a(_, _, block), b(_, _, block), sums);
      }
      cutlass::arch::NamedBarrier::sync(thr_size(product), cutlass::arch::ReservedNamedBarriers::Sm120MainloopBarrier);
      pipeline.consumer_release(state);
    }
  }
};

}  // namespace lrk
