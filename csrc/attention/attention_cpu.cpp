// Unpacks tensors for the CPU kernels of attention and spreads tasks over threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include "attention/attention.h"
#include "attention/attention_arguments.h"
#include "common/dispatch.h"
#include "common/large_outputs.h"

namespace fused_attn {
namespace {

using at::Tensor;

// Fewer sums than kMostChunks are split into chunks of heads and of rows, of at least so many.
// Neither depends on the number of threads, so that sums over chunks are the same bits on any
// machine.
constexpr int64_t kChunkRows = 192;

// Multiply-adds that are not worth waking another thread for.
constexpr double kSmallWork = 3e5;

// The vectors of the widest instruction set.
constexpr int64_t kMaxLanes = 16;

HeadRows head_rows(const Tensor& tensor, bool is_packed, Tensor& keep_alive) {
  const bool contiguous_rows = tensor.size(3) <= 1 || tensor.stride(3) == 1;
  keep_alive = contiguous_rows ? tensor : tensor.contiguous();
  return {keep_alive.const_data_ptr(), is_packed ? 0 : keep_alive.stride(0), keep_alive.stride(1),
          keep_alive.stride(2)};
}

OutputRows output_rows(const Tensor& tensor, bool is_packed) {
  return {tensor.mutable_data_ptr(), is_packed ? 0 : tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

PairTensor pair_strides(const Tensor& tensor) {
  int64_t strides[4] = {0, 0, 0, 0};
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) != 1) strides[4 - tensor.dim() + d] = tensor.stride(d);
  return {nullptr, DType::kFloat32, strides[0], strides[1], strides[2], strides[3]};
}

int64_t integer_at(const Tensor& tensor, int64_t i) {
  const int64_t at = i * tensor.stride(0);
  return tensor.scalar_type() == at::kInt ? tensor.const_data_ptr<int32_t>()[at]
                                          : tensor.const_data_ptr<int64_t>()[at];
}

// The kernel's parameters, and the memory that they point to.
struct Call {
  explicit Call(const AttentionArguments& a) {
    const Tensor& query = a.query;
    is_packed = a.query_offsets.has_value();
    in.is_packed = is_packed;
    in.heads = query.size(1);
    in.heads_per_key_head = in.heads / std::max<int64_t>(a.key.size(1), 1);
    in.queries = a.max_queries;
    in.keys = a.max_keys;
    in.head_size = query.size(3);
    in.value_size = a.value.size(3);
    TORCH_CHECK(in.head_size <= kMaxHeadSize && in.value_size <= kMaxHeadSize,
                "attention: the cpu kernels take head sizes up to ", kMaxHeadSize);
    TORCH_CHECK(in.heads == a.key.size(1) * in.heads_per_key_head,
                "attention: the heads of key must divide those of query");
    in.q = head_rows(query, is_packed, q);
    in.k = head_rows(a.key, is_packed, k);
    in.v = head_rows(a.value, is_packed, v);
    in.left = a.left < 0 ? kUnbounded : std::min(a.left, kUnbounded);
    in.right = a.right < 0 ? kUnbounded : std::min(a.right, kUnbounded);
    in.align_lower_right = a.align_lower_right;
    in.scale = static_cast<float>(a.scale);
    in.softcap = static_cast<float>(a.softcap);
    in.activation = static_cast<Activation>(a.activation);
    in.dtype = kernel_dtype(query.scalar_type());
    in.keep_scale = 1.0f;
    if (a.dropout_p > 0.0) {
      in.keep_threshold = keep_threshold(a.dropout_p);
      in.keep_scale = static_cast<float>(1.0 / (1.0 - a.dropout_p));
      in.seed = dropout_seed("attention", a.seed, a.dropout_p);
    }
    if (a.mask) {
      in.mask = pair_strides(*a.mask);
      in.mask.data = a.mask->const_data_ptr();
    }
    if (a.bias) {
      in.bias = pair_strides(*a.bias);
      in.bias.data = a.bias->const_data_ptr();
      in.bias.dtype = kernel_dtype(a.bias->scalar_type());
    }
    if (a.alibi_slopes) {
      slopes = a.alibi_slopes->to(at::kFloat);
      in.alibi_slopes = slopes.const_data_ptr<float>();
      in.alibi_stride_b = slopes.dim() == 2 ? slopes.stride(0) : 0;
      in.alibi_stride_h = slopes.stride(-1);
    }
    find_sequences(a);
    const int64_t rows = query.size(2);
    in.lse_stride_b = is_packed ? 0 : in.heads * rows;
    in.lse_stride_h = rows;
    if (!a.block_mask.empty()) {
      TORCH_CHECK(a.block_mask.size() == 6, "attention: a block mask is six tensors");
      tiles = a.block_mask[0].contiguous();
      bits = a.block_mask[1].contiguous();
      BlockMask& m = in.block_mask;
      m.tiles = tiles.const_data_ptr<int32_t>();
      m.bits = reinterpret_cast<const uint32_t*>(bits.const_data_ptr<int32_t>());
      m.query_tiles = tiles.size(2);
      m.key_tiles = tiles.size(3);
      TORCH_CHECK(m.query_tiles * kMaskTile >= in.queries && m.key_tiles * kMaskTile >= in.keys,
                  "attention: the block mask does not cover the queries and keys");
      m.stride_h = tiles.size(1) == 1 ? 0 : m.query_tiles * m.key_tiles;
      m.stride_b = tiles.size(0) == 1 ? 0 : tiles.size(1) * m.query_tiles * m.key_tiles;
    }
  }

  // Whatever lengths and offsets say, the kernel stays inside of the tensors.
  void find_sequences(const AttentionArguments& a) {
    const int64_t query_rows = a.query.size(2), key_rows = a.key.size(2);
    const int64_t batch = is_packed ? a.query_offsets->size(0) - 1 : a.query.size(0);
    int64_t owned_queries = 0, owned_keys = 0;
    sequences.reserve(batch);
    for (int64_t b = 0; b < batch; ++b) {
      Sequence sequence{0, in.queries, 0, in.keys};
      if (is_packed) {
        const auto owned = [&](const Tensor& offsets, int64_t rows, int64_t most, int64_t& begin) {
          begin = std::clamp<int64_t>(integer_at(offsets, b), 0, rows);
          return std::min(std::clamp(integer_at(offsets, b + 1), begin, rows) - begin, most);
        };
        sequence.queries = owned(*a.query_offsets, query_rows, in.queries, sequence.query_begin);
        sequence.keys = owned(*a.key_offsets, key_rows, in.keys, sequence.key_begin);
      } else {
        if (a.query_lengths)
          sequence.queries = std::clamp<int64_t>(integer_at(*a.query_lengths, b), 0, in.queries);
        if (a.key_lengths)
          sequence.keys = std::clamp<int64_t>(integer_at(*a.key_lengths, b), 0, in.keys);
      }
      owned_queries += sequence.queries;
      owned_keys += sequence.keys;
      sequences.push_back(sequence);
    }
    in.sequences = sequences.data();
    owns_queries = !is_packed || owned_queries == query_rows;
    owns_keys = !is_packed || owned_keys == key_rows;
  }

  int64_t batch() const { return static_cast<int64_t>(sequences.size()); }

  // Rows of the shape of `like`, but so wide; zero where the kernel does not write all of them.
  Tensor empty_rows(const Tensor& like, int64_t width, bool owns) const {
    const auto allocate = [&](at::IntArrayRef shape) {
      return owns ? in_huge_pages(at::empty(shape, like.options()))
                  : at::zeros(shape, like.options());
    };
    if (!is_packed) return allocate({like.size(0), like.size(1), like.size(2), width});
    return allocate({like.size(2), like.size(1), width}).transpose(0, 1).unsqueeze(0);
  }

  AttentionInputs in{};
  bool is_packed;
  bool owns_queries;  // every row of the query belongs to a sequence
  bool owns_keys;
  Tensor q, k, v, slopes, tiles, bits;
  c10::SmallVector<Sequence, 16> sequences;
};

struct Plan {
  c10::SmallVector<int64_t, 1> heads;  // empty where they are in order
  c10::SmallVector<AttentionTask, 32> tasks;
  int64_t row_chunks = 1;
  int64_t head_chunks = 1;
  bool chunks_of_tensor = false;
  double work = 0.0;

  AttentionTasks view() const {
    return {tasks.data(), static_cast<int64_t>(tasks.size()),
            heads.empty() ? nullptr : heads.data(), row_chunks, chunks_of_tensor};
  }
};

// About how many pairs some rows of a head have, and the rows' keys, which must be packed.
double work_of(const AttentionInputs& in, int64_t b, int64_t h, Span rows) {
  const Sequence& sequence = in.sequences[b];
  const int64_t count = rows.end - rows.begin;
  if (count == 0) return 0.0;
  const int64_t diagonal = diagonal_of(in, sequence);
  double pairs = static_cast<double>(count) * static_cast<double>(sequence.keys);
  if (in.left < kUnbounded || in.right < kUnbounded) {
    constexpr int64_t kSamples = 8;
    int64_t total = 0;
    for (int64_t i = 0; i < kSamples; ++i) {
      const int64_t t = rows.begin + count * (2 * i + 1) / (2 * kSamples);
      const Span span = window_of(in, diagonal, sequence.keys, t);
      total += span.end - span.begin;
    }
    pairs = static_cast<double>(count) * static_cast<double>(total) / kSamples;
  }
  if (in.block_mask.tiles) {
    const BlockMask& m = in.block_mask;
    const int32_t* tiles = m.tiles + b * m.stride_b + h * m.stride_h;
    const int64_t begin = rows.begin / kMaskTile, end = (rows.end - 1) / kMaskTile + 1;
    int64_t shown = 0;
    for (int64_t i = begin * m.key_tiles; i < end * m.key_tiles; ++i) shown += tiles[i] != 0;
    pairs *= static_cast<double>(shown) / static_cast<double>((end - begin) * m.key_tiles);
  }
  const Span keys = keys_of_rows(in, sequence, rows);
  return pairs + 8.0 * static_cast<double>(keys.end - keys.begin);
}

// One task a group of heads and chunk of rows, those with most to do first. Group i has the heads
// [i * size, (i + 1) * size) of the plan.
void add_tasks(const AttentionInputs& in, int64_t groups, int64_t size, Plan& plan) {
  c10::SmallVector<double, 32> work;
  bool uneven = false;
  AttentionTasks tasks{nullptr, 0, nullptr, plan.row_chunks, plan.chunks_of_tensor};
  // What a head costs is often what the one before it did.
  const bool by_head = in.block_mask.stride_h != 0;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t head_chunk = 0; head_chunk < plan.head_chunks; ++head_chunk)
      for (int64_t c = 0; c < plan.row_chunks; ++c) {
        const int64_t first = group * size + size * head_chunk / plan.head_chunks;
        const int64_t last = group * size + size * (head_chunk + 1) / plan.head_chunks;
        double total = 0.0, one = 0.0;
        int64_t known = -1;
        for (int64_t i = first; i < last; ++i) {
          const int64_t head = plan.heads.empty() ? i : plan.heads[i];
          const int64_t b = head / in.heads;
          if (by_head || b != known)
            one = work_of(in, b, head % in.heads, rows_of_chunk(in, tasks, in.sequences[b], c));
          known = b;
          total += one;
        }
        plan.tasks.push_back({first, last, c, head_chunk * plan.row_chunks + c});
        uneven |= !work.empty() && total != work[0];
        work.push_back(total);
        plan.work += total;
      }
  if (!uneven) return;
  c10::SmallVector<std::pair<double, int64_t>, 32> order;
  for (size_t i = 0; i < work.size(); ++i) order.push_back({-work[i], static_cast<int64_t>(i)});
  std::sort(order.begin(), order.end());
  const auto tasks_in_order = plan.tasks;
  for (size_t i = 0; i < order.size(); ++i) plan.tasks[i] = tasks_in_order[order[i].second];
}

int64_t row_chunks_for(const AttentionInputs& in, int64_t groups) {
  if (groups == 0 || groups >= kMostChunks) return 1;
  return std::clamp<int64_t>(in.queries / kChunkRows, 1, (kMostChunks + groups - 1) / groups);
}

template <typename Kernel>
void run_tasks(const Plan& plan, const AttentionInputs& in, AttentionTasks& tasks,
               Kernel&& kernel) {
  int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks.count);
  if (plan.work * static_cast<double>(in.head_size + in.value_size) < kSmallWork)
    threads = std::min<int64_t>(threads, 1);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel(tasks);
  });
}

std::tuple<Tensor, Tensor> forward(const AttentionArguments& a) {
  const Call call(a);
  const int64_t B = call.batch(), H = a.query.size(1);
  AttentionForward p{};
  p.in = call.in;
  const Tensor output = call.empty_rows(a.query, a.value.size(3), call.owns_queries);
  const auto fp32 = a.query.options().dtype(at::kFloat);
  const Tensor lse = call.owns_queries ? at::empty(a.query.sizes().slice(0, 3), fp32)
                                       : at::full(a.query.sizes().slice(0, 3),
                                                  -std::numeric_limits<double>::infinity(), fp32);
  p.output = output_rows(output, call.is_packed);
  p.lse = lse.mutable_data_ptr<float>();
  // Heads that share a key head are one task where that leaves work for all threads.
  Plan plan;
  const int64_t size =
      B * a.key.size(1) >= std::min<int64_t>(2 * at::get_num_threads(), kMostChunks)
          ? p.in.heads_per_key_head
          : 1;
  plan.row_chunks = row_chunks_for(p.in, B * H);
  add_tasks(p.in, B * H / std::max<int64_t>(size, 1), size, plan);
  AttentionTasks tasks = plan.view();
  run_tasks(plan, p.in, tasks,
            [&](AttentionTasks& t) { FUSED_ATTN_CALL_KERNEL(attention_forward, p, t); });
  return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output,
                                                    const OptionalTensor& grad_lse,
                                                    const AttentionArguments& a,
                                                    const Tensor& output, const Tensor& lse,
                                                    bool need_grad_bias) {
  const Call call(a);
  const int64_t B = call.batch(), H = a.query.size(1), Hk = a.key.size(1);
  const int64_t D = a.query.size(3), Dv = a.value.size(3);
  const auto fp32 = a.query.options().dtype(at::kFloat);
  Tensor grad_output_owner, output_owner;
  const Tensor lse_rows = lse.contiguous();
  const Tensor grad_lse_rows = grad_lse ? grad_lse->contiguous() : Tensor();
  const Tensor dq = call.empty_rows(a.query, D, call.owns_queries);
  const Tensor dk = call.empty_rows(a.key, D, call.owns_keys);
  const Tensor dv = call.empty_rows(a.value, Dv, call.owns_keys);
  AttentionBackward p{};
  p.in = call.in;
  p.grad_output = head_rows(grad_output, call.is_packed, grad_output_owner);
  p.output = head_rows(output, call.is_packed, output_owner);
  p.lse = lse_rows.const_data_ptr<float>();
  if (grad_lse) p.grad_lse = grad_lse_rows.const_data_ptr<float>();
  p.dq = output_rows(dq, call.is_packed);
  p.dk_out = output_rows(dk, call.is_packed);
  p.dv_out = output_rows(dv, call.is_packed);

  // Heads that share a key head, or a slice of the bias whose gradient is needed, are one group.
  const OptionalTensor& bias = a.bias;
  const bool by_batch = !need_grad_bias || (bias->dim() == 4 && bias->size(0) != 1);
  const bool by_head = !need_grad_bias || (bias->dim() >= 3 && bias->size(-3) != 1);
  const int64_t groups = B * H == 0 ? 0 : (by_batch ? B : 1) * (by_head ? Hk : 1);
  Plan plan;
  if (by_head && !by_batch)
    for (int64_t h = 0; h < H; h += p.in.heads_per_key_head)
      for (int64_t b = 0; b < B; ++b)
        for (int64_t i = 0; i < p.in.heads_per_key_head; ++i) plan.heads.push_back(b * H + h + i);
  if (!need_grad_bias && groups > 0)
    plan.head_chunks = std::clamp<int64_t>(kMostChunks / groups, 1, p.in.heads_per_key_head);
  plan.row_chunks = row_chunks_for(p.in, groups * plan.head_chunks);
  // Rows of the bias belong to one chunk, whatever the lengths.
  plan.chunks_of_tensor = need_grad_bias;
  const int64_t chunks = plan.row_chunks * plan.head_chunks;
  add_tasks(p.in, groups, groups == 0 ? 0 : B * H / groups, plan);

  p.first_in_result =
      a.query.scalar_type() == at::kFloat && D % kMaxLanes == 0 && Dv % kMaxLanes == 0;
  const int64_t buffers = chunks - (p.first_in_result ? 1 : 0);
  Tensor sums_of_k, sums_of_v;
  const auto chunk_sums = [&](const Tensor& result, int64_t width, Tensor& owner) -> ChunkSums {
    if (buffers == 0) return {};
    const int64_t padded = (width + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
    owner = at::empty({buffers, result.size(0), Hk, result.size(2), padded}, fp32);
    return {owner.mutable_data_ptr<float>(), owner.stride(0), call.is_packed ? 0 : owner.stride(1),
            owner.stride(2), owner.stride(3)};
  };
  p.dk = chunk_sums(dk, D, sums_of_k);
  p.dv = chunk_sums(dv, Dv, sums_of_v);

  Tensor dbias = at::empty({0}, fp32);
  if (need_grad_bias) {
    // Chunks own rows of the gradient unless it is the same for all rows.
    const bool by_row = bias->dim() >= 2 && bias->size(-2) != 1;
    std::vector<int64_t> shape = bias->sizes().vec();
    shape.insert(shape.begin(), by_row ? 1 : plan.row_chunks);
    dbias = at::zeros(shape, fp32);
    p.dbias = dbias.mutable_data_ptr<float>();
    p.dbias_strides = pair_strides(dbias.select(0, 0));
    p.dbias_chunk_stride = by_row ? 0 : bias->numel();
  }
  AttentionTasks tasks = plan.view();
  run_tasks(plan, p.in, tasks,
            [&](AttentionTasks& t) { FUSED_ATTN_CALL_KERNEL(attention_backward, p, t); });
  if (buffers > 0)
    at::parallel_for(0, B * Hk, 1, [&](int64_t begin, int64_t end) {
      FUSED_ATTN_CALL_KERNEL(attention_finish, p, tasks, plan.head_chunks, begin, end);
    });
  if (need_grad_bias) {
    Tensor sum = dbias.select(0, 0);
    for (int64_t c = 1; c < dbias.size(0); ++c) sum.add_(dbias.select(0, c));
    dbias = sum.to(bias->scalar_type());
  }
  return {dq, dk, dv, dbias};
}

}  // namespace
}  // namespace fused_attn

TORCH_LIBRARY_IMPL(fused_attn_C, CPU, m) {
  m.impl("attention_forward", &fused_attn::attention_forward<fused_attn::forward>);
  m.impl("attention_backward", &fused_attn::attention_backward<fused_attn::backward>);
}
