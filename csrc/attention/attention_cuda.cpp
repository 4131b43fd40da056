// Unpacks tensors for the CUDA kernels of attention, and chooses among them.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "attention/attention_arguments.h"
#include "attention/attention_cuda.h"
#include "common/cuda_binding.h"
#include "common/dispatch.h"

namespace fused_attn {
namespace {

using at::Tensor;

constexpr int64_t kLargestHeadSize = 256;

// Whether every row is contiguous and, with its end, at a multiple of 16 bytes.
bool has_vectors(const Tensor& tensor) {
  const int64_t elements = 16 / tensor.element_size();
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 != 0) return false;
  if (tensor.size(3) % elements != 0 || (tensor.size(3) > 1 && tensor.stride(3) != 1)) return false;
  for (int64_t d = 0; d < 3; ++d)
    if (tensor.size(d) > 1 && tensor.stride(d) % elements != 0) return false;
  return true;
}

// The tensor, or a copy of it whose rows are padded with zeros to whole vectors.
Tensor with_vectors(const Tensor& tensor) {
  if (tensor.numel() == 0 || has_vectors(tensor)) return tensor;
  const int64_t elements = 16 / tensor.element_size();
  const int64_t padding = (elements - tensor.size(3) % elements) % elements;
  if (padding > 0) return at::constant_pad_nd(tensor, {0, padding}).contiguous();
  return tensor.clone(at::MemoryFormat::Contiguous);
}

AttentionRows rows_of(const Tensor& tensor, bool is_packed) {
  return {tensor.const_data_ptr(), is_packed ? 0 : tensor.stride(0), tensor.stride(1),
          tensor.stride(2), static_cast<int>(tensor.size(3))};
}

AttentionResult result_of(const Tensor& tensor, bool is_packed) {
  return {tensor.mutable_data_ptr(), is_packed ? 0 : tensor.stride(0), tensor.stride(1),
          tensor.stride(2),          static_cast<int>(tensor.size(3)), has_vectors(tensor)};
}

// Sizes or strides as those of [B, H, T, S]; the stride of a dimension that is broadcast is 0.
struct PairShape {
  explicit PairShape(const Tensor& tensor) {
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      const int64_t at = 4 - tensor.dim() + d;
      sizes[at] = tensor.size(d);
      if (tensor.size(d) != 1) strides[at] = tensor.stride(d);
    }
  }
  int64_t sizes[4] = {1, 1, 1, 1};
  int64_t strides[4] = {0, 0, 0, 0};
};

AttentionPairs pairs_of(const Tensor& tensor) {
  const PairShape shape(tensor);
  return {tensor.const_data_ptr(), shape.strides[0], shape.strides[1], shape.strides[2],
          shape.strides[3]};
}

// The kernels' parameters, and the memory that they point to.
class Call {
 public:
  explicit Call(const AttentionArguments& a) : is_packed(a.query_offsets.has_value()) {
    TORCH_CHECK(a.query.scalar_type() == at::kHalf || a.query.scalar_type() == at::kBFloat16,
                "attention: the cuda kernels take float16 and bfloat16");
    const int64_t head_size = std::max(a.query.size(3), a.value.size(3));
    TORCH_CHECK(head_size <= kLargestHeadSize, "attention: the cuda kernels take head sizes up to ",
                kLargestHeadSize);
    TORCH_CHECK(std::max(a.max_queries, a.max_keys) < kNoBound / 2 &&
                    std::max(a.query.size(2), a.key.size(2)) < kNoBound / 2,
                "attention: the cuda kernels take lengths below ", kNoBound / 2);
    bucket = head_size <= 32    ? 32
             : head_size <= 64  ? 64
             : head_size <= 96  ? 96
             : head_size <= 128 ? 128
                                : 256;
    batch = is_packed ? a.query_offsets->size(0) - 1 : a.query.size(0);
    heads = a.query.size(1);
    queries = a.max_queries;
    keys = a.max_keys;
    in.q = rows_of(kept(with_vectors(a.query)), is_packed);
    in.k = rows_of(kept(with_vectors(a.key)), is_packed);
    in.v = rows_of(kept(with_vectors(a.value)), is_packed);
    in.batch = static_cast<int>(batch);
    in.heads = static_cast<int>(heads);
    in.heads_per_key = static_cast<int>(heads / std::max<int64_t>(a.key.size(1), 1));
    in.queries = static_cast<int>(queries);
    in.keys = static_cast<int>(keys);
    in.query_rows = static_cast<int>(a.query.size(2));
    in.key_rows = static_cast<int>(a.key.size(2));
    in.is_packed = is_packed;
    if (is_packed) {
      in.query_offsets = integers(a.query_offsets);
      in.key_offsets = integers(a.key_offsets);
    } else {
      in.query_lengths = integers(a.query_lengths);
      in.key_lengths = integers(a.key_lengths);
    }
    in.align_lower_right = a.align_lower_right;
    in.left = bound(a.left);
    in.right = bound(a.right);
    in.scale = static_cast<float>(a.scale);
    in.softcap = static_cast<float>(a.softcap);
    in.activation = static_cast<AttentionActivation>(a.activation);
    in.keep_scale = 1.0f;
    if (a.dropout_p > 0.0) {
      TORCH_CHECK(a.seed.has_value(), "attention: dropout needs a seed");
      in.seed = a.seed->const_data_ptr<int64_t>();
      in.keep_threshold = keep_threshold(a.dropout_p);
      in.keep_scale = static_cast<float>(1.0 / (1.0 - a.dropout_p));
    }
    if (a.mask) in.mask = pairs_of(*a.mask);
    if (a.bias) {
      in.bias = pairs_of(*a.bias);
      in.bias_is_fp32 = a.bias->scalar_type() == at::kFloat;
    }
    if (a.alibi_slopes) {
      const Tensor slopes = kept(a.alibi_slopes->contiguous());
      in.slopes = slopes.const_data_ptr<float>();
      in.slopes_stride_b = slopes.dim() == 2 ? heads : 0;
    }
    if (!a.block_mask.empty()) {
      TORCH_CHECK(a.block_mask.size() == 6, "attention: a block mask is six tensors");
      const Tensor tiles = kept(a.block_mask[0].contiguous());
      const Tensor bits = kept(a.block_mask[1].contiguous());
      TORCH_CHECK(
          tiles.size(2) * kBlockMaskTile >= queries && tiles.size(3) * kBlockMaskTile >= keys,
          "attention: the block mask does not cover the queries and keys");
      in.blocks.tiles = tiles.const_data_ptr<int32_t>();
      in.blocks.bits = reinterpret_cast<const uint32_t*>(bits.const_data_ptr<int32_t>());
      in.blocks.stride_h = tiles.size(1) == 1 ? 0 : tiles.size(2) * tiles.size(3);
      in.blocks.stride_b = tiles.size(0) == 1 ? 0 : tiles.size(1) * tiles.size(2) * tiles.size(3);
      in.blocks.key_tiles = static_cast<int>(tiles.size(3));
    }
    // The gradient of a bias in fp32 is as exact as the bias: a conversion of a large lse to
    // another unit would round it.
    in.exact = in.bias_is_fp32;
    const float log2e = 1.4426950408889634f;
    const bool in_nature = in.exact || in.activation == AttentionActivation::kRelu;
    in.logit_unit = in_nature ? 1.0f : log2e;
    in.exponent_unit = in_nature ? log2e : 1.0f;
    general = a.mask || a.bias || a.alibi_slopes || !a.block_mask.empty() || a.dropout_p > 0.0 ||
              a.softcap > 0.0 || in.activation != AttentionActivation::kSoftmax ||
              // Maxima and exponentials take a positive scale along.
              !(in.scale > 0.0f);
  }

  bool has_queries() const { return batch * heads * queries > 0; }
  bool has_pairs() const { return has_queries() && keys > 0; }

  // Rows of the shape of `like`, but so wide. Rows of no sequence of a packed batch are zeros.
  Tensor empty_rows(const Tensor& like, int64_t width) const {
    if (!is_packed)
      return at::empty({like.size(0), like.size(1), like.size(2), width}, like.options());
    return at::zeros({like.size(2), like.size(1), width}, like.options())
        .transpose(0, 1)
        .unsqueeze(0);
  }

  // Calls `function` with an element and a number: the element type and the head size.
  template <typename Function>
  void dispatch(const Tensor& query, const Function& function) const {
    if (query.scalar_type() == at::kHalf)
      dispatch_head_size(__half(), function);
    else
      dispatch_head_size(__nv_bfloat16(), function);
  }

  // Classifies the tiles of the boolean mask, if there is one.
  void classify_mask(const AttentionArguments& a, const CudaCall& cuda) {
    if (!a.mask) return;
    const PairShape shape(*a.mask);
    const auto tiles = [](int64_t size) {
      return static_cast<int>((size + kMaskClassTile - 1) / kMaskClassTile);
    };
    // Dimensions that were expanded are one element, too.
    const auto size = [&](int d) { return shape.strides[d] == 0 ? 1 : shape.sizes[d]; };
    const AttentionMaskSizes sizes{static_cast<int>(size(0)),
                                   static_cast<int>(size(1)),
                                   static_cast<int>(size(2)),
                                   static_cast<int>(size(3)),
                                   tiles(size(2)),
                                   tiles(size(3))};
    const Tensor classes =
        kept(at::empty({sizes.batch, sizes.heads, sizes.row_tiles, sizes.column_tiles},
                       a.mask->options().dtype(at::kByte)));
    in.mask_classes = {
        classes.mutable_data_ptr<uint8_t>(), sizes.batch == 1 ? 0 : classes.stride(0),
        sizes.heads == 1 ? 0 : classes.stride(1), sizes.row_tiles == 1 ? 0 : sizes.column_tiles,
        sizes.column_tiles == 1 ? 0 : 1};
    dispatch(a.query, [&](auto element, auto head_size) {
      attention_mask_classes_cuda<decltype(element), head_size()>(in, sizes, cuda.stream);
    });
  }

  Tensor kept(Tensor tensor) {
    owned_.push_back(tensor);
    return tensor;
  }

  AttentionCall in{};
  bool is_packed;
  bool general;
  int bucket;
  int64_t batch;
  int64_t heads;
  int64_t queries;
  int64_t keys;

 private:
  AttentionIntegers integers(const OptionalTensor& tensor) {
    if (!tensor) return {};
    return {kept(tensor->contiguous()).const_data_ptr(), tensor->scalar_type() == at::kLong};
  }

  // Beyond all queries and keys a bound is none, but for the sums with it.
  int bound(int64_t side) const {
    return side < 0 || side >= queries + keys ? kNoBound : static_cast<int>(side);
  }

  template <typename T, typename Function>
  void dispatch_head_size(T element, const Function& function) const {
    switch (bucket) {
      case 32:
        return function(element, std::integral_constant<int, 32>());
      case 64:
        return function(element, std::integral_constant<int, 64>());
      case 96:
        return function(element, std::integral_constant<int, 96>());
      case 128:
        return function(element, std::integral_constant<int, 128>());
      default:
        return function(element, std::integral_constant<int, 256>());
    }
  }

  std::vector<Tensor> owned_;
};

std::tuple<Tensor, Tensor> forward(const AttentionArguments& a) {
  const CudaCall cuda(a.query);
  Call call(a);
  const Tensor output = call.empty_rows(a.query, a.value.size(3));
  const auto fp32 = a.query.options().dtype(at::kFloat);
  const auto lse_shape = a.query.sizes().slice(0, 3);
  const Tensor lse = call.is_packed
                         ? at::full(lse_shape, -std::numeric_limits<double>::infinity(), fp32)
                         : at::empty(lse_shape, fp32);
  if (!call.has_queries()) return {output, lse};
  if (call.keys > 0) call.classify_mask(a, cuda);
  AttentionForwardCuda p{};
  p.call = call.in;
  p.output = result_of(output, call.is_packed);
  p.lse = lse.mutable_data_ptr<float>();
  call.dispatch(a.query, [&](auto element, auto head_size) {
    attention_forward_cuda<decltype(element), head_size()>(p, call.general, cuda.stream);
  });
  return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output,
                                                    const OptionalTensor& grad_lse,
                                                    const AttentionArguments& a,
                                                    const Tensor& output, const Tensor& lse,
                                                    bool need_grad_bias) {
  const CudaCall cuda(a.query);
  Call call(a);
  const auto fp32 = a.query.options().dtype(at::kFloat);
  const Tensor dq = call.empty_rows(a.query, a.query.size(3));
  const Tensor dk = call.empty_rows(a.key, a.query.size(3));
  const Tensor dv = call.empty_rows(a.value, a.value.size(3));
  const bool wants_bias = need_grad_bias && a.bias.has_value();
  const Tensor dbias =
      wants_bias ? at::empty(a.bias->sizes(), a.bias->options()) : at::empty({0}, fp32);
  if (!call.has_pairs()) {
    for (const Tensor& gradient : {dq, dk, dv, dbias}) gradient.zero_();
    return {dq, dk, dv, dbias};
  }
  call.classify_mask(a, cuda);
  const Tensor lse_rows = call.kept(lse.contiguous());
  const int64_t padded = (call.queries + kStatisticsTile - 1) / kStatisticsTile * kStatisticsTile;
  const Tensor statistics = at::empty({2, call.batch, call.heads, padded}, fp32);
  AttentionBackwardCuda p{};
  p.call = call.in;
  p.output = rows_of(call.kept(with_vectors(output)), call.is_packed);
  p.grad_output = rows_of(call.kept(with_vectors(grad_output)), call.is_packed);
  p.lse = lse_rows.const_data_ptr<float>();
  if (grad_lse && call.in.activation == AttentionActivation::kSoftmax) {
    p.grad_lse = grad_lse->const_data_ptr<float>();
    p.grad_lse_stride_b = grad_lse->stride(0);
    p.grad_lse_stride_h = grad_lse->stride(1);
    p.grad_lse_stride_t = grad_lse->stride(2);
  }
  p.dq = result_of(dq, call.is_packed);
  p.dk = result_of(dk, call.is_packed);
  p.dv = result_of(dv, call.is_packed);
  p.row_lse = statistics.mutable_data_ptr<float>();
  p.row_delta = p.row_lse + statistics.stride(0);
  call.dispatch(a.query, [&](auto element, auto head_size) {
    using T = decltype(element);
    attention_backward_cuda<T, head_size()>(p, call.general, cuda.stream);
    if (!wants_bias) return;
    AttentionBiasGradient g{};
    g.backward = p;
    g.data = dbias.mutable_data_ptr();
    std::copy_n(PairShape(dbias).sizes, 4, g.sizes);
    attention_bias_gradient_cuda<T, head_size()>(g, cuda.stream);
  });
  return {dq, dk, dv, dbias};
}

}  // namespace
}  // namespace fused_attn

FUSED_ATTN_CUDA_LIBRARY(m) {
  m.impl("attention_forward", &fused_attn::attention_forward<fused_attn::forward>);
  m.impl("attention_backward", &fused_attn::attention_backward<fused_attn::backward>);
}
