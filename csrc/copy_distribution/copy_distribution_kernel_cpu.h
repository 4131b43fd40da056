// CPU kernels of copy_distribution: raw pointers, no torch. Compiled once per instruction set.
//
// A row's logits are read once for their sum of exponentials; what is copied costs its own number.
// Of a row, what is one number is computed in fp64 from there on.
#pragma once

#include "common/rows.h"
#include "common/scratch.h"
#include "common/sum_exp.h"
#include "copy_distribution/copy_distribution.h"

namespace fused_attn {
namespace FUSED_ATTN_ISA {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

// log(e^a + e^b)
static inline double log_add(double a, double b) {
  const double high = a > b ? a : b;
  if (high == kNothing) return kNothing;
  return high + std::log1p(std::exp((a > b ? b : a) - high));
}

// log(1 / (1 + e^-x))
static inline double log_sigmoid(double x) {
  return x >= 0.0 ? -std::log1p(std::exp(-x)) : x - std::log1p(std::exp(x));
}

// A gradient of a weight whose word is hardly possible, which fp32 may not hold.
static inline float bounded(double x) {
  constexpr double kLargest = std::numeric_limits<float>::max();
  return static_cast<float>(x > kLargest ? kLargest : x < -kLargest ? -kLargest : x);
}

template <typename T>
struct CopyRow {
  CopyRow(const CopyDistribution& p, int64_t r)
      : logits(row_of<T>(p.logits, r)),
        copy(row_of<float>(p.copy, r)),
        tokens(row_of<int64_t>(p.tokens, r)),
        positions(p.positions) {
    if (p.lengths) {
      const int64_t length = p.lengths[r / p.rows_per_length];
      positions = length < 0 ? 0 : length < positions ? length : positions;
    }
    if (p.gate) {
      log_generate = log_sigmoid(p.gate[r]);
      log_copy = log_sigmoid(-static_cast<double>(p.gate[r]));
    }
  }

  const T* logits;
  const float* copy;
  const int64_t* tokens;  // a negative one takes no part
  int64_t positions;      // of the source
  double log_generate = 0.0;
  double log_copy = 0.0;
};

// What is added to a logit, and to the log of a weight or to a score, to give the log of the
// probability.
struct Shifts {
  double generate;
  double copy;
};

template <bool kHasGate, typename T>
static Shifts make_shifts(const CopyRow<T>& row, double lse) {
  return {row.log_generate - lse, kHasGate ? row.log_copy : -lse};
}

// The log of what normalises the row; `scores` is scratch for its positions.
template <bool kHasGate, typename T>
static double log_normaliser(const CopyRow<T>& row, int64_t vocabulary, float* scores) {
  const ExpSum generated = sum_exp(row.logits, vocabulary, 1.0, nullptr);
  double lse = generated.reference + std::log(generated.sum);
  if constexpr (!kHasGate) {
    for (int64_t s = 0; s < row.positions; ++s)
      scores[s] = row.tokens[s] < 0 ? kMinusInfinity : row.copy[s];
    const ExpSum copied = sum_exp(scores, row.positions, 1.0, nullptr);
    lse = log_add(lse, copied.reference + std::log(copied.sum));
  }
  // None of -inf alone has a share.
  return lse == kNothing ? -kNothing : lse;
}

// Calls run(T{}, has_gate) with the types and constants that the arguments name.
template <typename Run>
static void for_kind(const CopyDistribution& p, Run&& run) {
  const auto with_gate = [&](auto element) {
    if (p.gate) return run(element, std::true_type{});
    return run(element, std::false_type{});
  };
  switch (p.dtype) {
    case DType::kFloat32:
      return with_gate(float{});
    case DType::kFloat16:
      return with_gate(Half{});
    case DType::kBFloat16:
      return with_gate(BFloat16{});
  }
}

// --- a target -------------------------------------------------------------------------------

// Logs of the probabilities of generating a word and of copying it.
struct WordLogs {
  double generated;
  double copied;
};

template <bool kHasGate, typename T>
static WordLogs target_logs(const CopyRow<T>& row, int64_t vocabulary, int64_t target,
                            const Shifts& shifts) {
  WordLogs logs{kNothing, kNothing};
  if (target < 0) return logs;
  if (target < vocabulary) logs.generated = to_float(row.logits[target]) + shifts.generate;
  float largest = kMinusInfinity;
  if constexpr (!kHasGate) {
    for (int64_t s = 0; s < row.positions; ++s)
      if (row.tokens[s] == target && !(row.copy[s] <= largest)) largest = row.copy[s];
    if (largest == kMinusInfinity) return logs;
  }
  double sum = 0.0;
  for (int64_t s = 0; s < row.positions; ++s) {
    if (row.tokens[s] != target) continue;
    if constexpr (kHasGate)
      sum += row.copy[s];
    else
      sum += std::exp(static_cast<double>(row.copy[s] - largest));
  }
  logs.copied = std::log(sum) + shifts.copy;
  if constexpr (!kHasGate) logs.copied += largest;
  return logs;
}

template <bool kHasGate, typename T>
static void nll_row(const CopyDistributionForward& p, int64_t r, float* scores) {
  const CopyDistribution& call = p.call;
  const int64_t target = call.targets[r];
  if (target == call.ignore_index) {
    p.output[r] = 0.0f;
    p.lse[r] = 0.0f;
    return;
  }
  const CopyRow<T> row(call, r);
  const double lse = log_normaliser<kHasGate>(row, call.vocabulary, scores);
  const WordLogs logs =
      target_logs<kHasGate>(row, call.vocabulary, target, make_shifts<kHasGate>(row, lse));
  p.output[r] = static_cast<float>(-log_add(logs.generated, logs.copied));
  p.lse[r] = static_cast<float>(lse);
}

// --- all words ------------------------------------------------------------------------------

// A word of the source.
struct CopiedWord {
  int64_t token;
  float largest;  // of its scores
  double sum;     // of its weights, or of e^(score - largest)
};

// The words of the source that are below `size`, each once; slots[token] is then its place in
// `words`. Both are scratch: before that, and once the words are forgotten, all slots are -1.
class CopiedWords {
 public:
  CopiedWords(int64_t size, int64_t positions) : size_(size), slots_(size), words_(positions) {
    std::fill_n(slots_.data(), size, -1);
  }

  template <bool kHasGate, typename T>
  void find(const CopyRow<T>& row) {
    for_each(row, [&](int64_t, int64_t token, float score) {
      int32_t& slot = slots_.data()[token];
      if (slot < 0) {
        slot = count_;
        words_.data()[count_++] = {token, score, 0.0};
      } else if (CopiedWord& word = words_.data()[slot]; !(score <= word.largest)) {
        word.largest = score;
      }
    });
    for_each(row, [&](int64_t, int64_t token, float score) {
      CopiedWord& word = words_.data()[slots_.data()[token]];
      if constexpr (kHasGate)
        word.sum += score;
      else
        word.sum += score == word.largest ? 1.0 : std::exp(score - word.largest);
    });
  }

  // Calls visit(s, token, copy[s]) for the positions of words below the size.
  template <typename T, typename Visit>
  FUSED_ATTN_INLINE void for_each(const CopyRow<T>& row, Visit&& visit) const {
    for (int64_t s = 0; s < row.positions; ++s) {
      const int64_t token = row.tokens[s];
      if (token >= 0 && token < size_) visit(s, token, row.copy[s]);
    }
  }

  void forget() {
    for (const CopiedWord& word : *this) slots_.data()[word.token] = -1;
    count_ = 0;
  }

  int32_t count() const { return count_; }
  int32_t place(int64_t token) { return slots_.data()[token]; }
  CopiedWord* begin() { return words_.data(); }
  CopiedWord* end() { return words_.data() + count_; }

 private:
  int64_t size_;
  int32_t count_ = 0;
  Scratch<int32_t> slots_;
  Scratch<CopiedWord> words_;
};

template <bool kHasGate, typename T>
static WordLogs word_logs(const CopyRow<T>& row, int64_t vocabulary, const CopiedWord& word,
                          const Shifts& shifts) {
  WordLogs logs{kNothing, std::log(word.sum) + shifts.copy};
  if constexpr (!kHasGate) logs.copied += word.largest;
  if (word.token < vocabulary) logs.generated = to_float(row.logits[word.token]) + shifts.generate;
  return logs;
}

template <bool kHasGate, typename T>
static void log_probs_row(const CopyDistributionForward& p, int64_t r, float* scores,
                          CopiedWords& words) {
  const CopyDistribution& call = p.call;
  const CopyRow<T> row(call, r);
  const double lse = log_normaliser<kHasGate>(row, call.vocabulary, scores);
  const Shifts shifts = make_shifts<kHasGate>(row, lse);
  float* output = p.output + r * call.extended_size;
  const Vec shift = broadcast(static_cast<float>(shifts.generate));
  for_vectors(call.vocabulary, [&](int64_t i, auto lanes, int) {
    const Vec v = load_lanes(row.logits + i, lanes) + shift;
    if (p.streams)
      stream_lanes(output + i, v, lanes);
    else
      store_lanes(output + i, v, lanes);
  });
  // Before anything is stored over what was streamed.
  if (p.streams) end_streams();
  std::fill(output + call.vocabulary, output + call.extended_size, kMinusInfinity);
  words.find<kHasGate>(row);
  for (const CopiedWord& word : words) {
    const WordLogs logs = word_logs<kHasGate>(row, call.vocabulary, word, shifts);
    output[word.token] = static_cast<float>(log_add(logs.generated, logs.copied));
  }
  words.forget();
  p.lse[r] = static_cast<float>(lse);
}

void copy_distribution_forward(const CopyDistributionForward& p, int64_t begin, int64_t end) {
  const CopyDistribution& call = p.call;
  Scratch<float> scores(call.positions);
  for_kind(call, [&](auto element, auto has_gate) {
    using T = decltype(element);
    if (call.targets) {
      for (int64_t r = begin; r < end; ++r) nll_row<has_gate.value, T>(p, r, scores.data());
      return;
    }
    CopiedWords words(call.extended_size, call.positions);
    for (int64_t r = begin; r < end; ++r)
      log_probs_row<has_gate.value, T>(p, r, scores.data(), words);
  });
}

// --- backward -------------------------------------------------------------------------------

// Bytes ahead of the loads that are fetched into the cache.
template <typename T>
constexpr int64_t kAhead = kPrefetch / static_cast<int64_t>(sizeof(T));

// Writes value(i, lanes, logit), where i is the first column of a vector, to a row of gradients.
template <typename T, typename Value>
FUSED_ATTN_INLINE void write_row(const T* logits, T* gradients, int64_t width, bool streams,
                                 Value&& value) {
  for_vectors(width, [&](int64_t i, auto lanes, int slot) {
    if (slot == 0) prefetch(logits + kAhead<T>, i);
    const Vec v = value(i, lanes, load_lanes(logits + i, lanes));
    if (streams)
      stream_lanes(gradients + i, v, lanes);
    else
      store_lanes(gradients + i, v, lanes);
  });
  // Before anything is stored over what was streamed.
  if (streams) end_streams();
}

static inline double softmax_of(double logit, double lse) { return std::exp(logit - lse); }

template <bool kHasGate, typename T>
static void nll_backward_row(const CopyDistributionBackward& p, int64_t r) {
  const CopyDistribution& call = p.call;
  const int64_t target = call.targets[r];
  T* grad_logits = static_cast<T*>(p.grad_logits) + r * call.vocabulary;
  float* grad_copy = p.grad_copy + r * call.positions;
  const CopyRow<T> row(call, r);
  const double lse = p.lse[r];
  const Shifts shifts = make_shifts<kHasGate>(row, lse);
  WordLogs logs{kNothing, kNothing};
  if (target != call.ignore_index)
    logs = target_logs<kHasGate>(row, call.vocabulary, target, shifts);
  const double log_p = log_add(logs.generated, logs.copied);
  std::fill_n(grad_copy, call.positions, 0.0f);
  if (p.grad_gate) p.grad_gate[r] = 0.0f;
  if (log_p == kNothing) {
    std::memset(grad_logits, 0, sizeof(T) * static_cast<size_t>(call.vocabulary));
    return;
  }
  const double grad = p.grad_nll[r];
  // The shares of the two ways in the target's probability.
  const double generated = std::exp(logs.generated - log_p);
  const double copied = std::exp(logs.copied - log_p);
  const double scale = kHasGate ? grad * generated : grad;
  const Vec scale_of_all = broadcast(static_cast<float>(scale));
  const Vec lse_of_all = broadcast(static_cast<float>(lse));
  write_row(row.logits, grad_logits, call.vocabulary, p.streams, [&](int64_t, auto, Vec logit) {
    return scale_of_all * exp_of_negative(logit - lse_of_all);
  });
  if (target < call.vocabulary) {
    const double softmax = softmax_of(to_float(row.logits[target]), lse);
    grad_logits[target] = from_float<T>(static_cast<float>(scale * softmax - grad * generated));
  }
  for (int64_t s = 0; s < row.positions; ++s) {
    if constexpr (kHasGate) {
      if (row.tokens[s] == target) grad_copy[s] = bounded(-grad * std::exp(shifts.copy - log_p));
    } else if (row.tokens[s] >= 0) {
      const double score = row.copy[s];
      double g = grad * softmax_of(score, lse);
      if (row.tokens[s] == target) g -= grad * std::exp(score + shifts.copy - log_p);
      grad_copy[s] = static_cast<float>(g);
    }
  }
  if (p.grad_gate) {
    p.grad_gate[r] = static_cast<float>(
        -grad * (generated * std::exp(row.log_copy) - copied * std::exp(row.log_generate)));
  }
}

// A word of the source, backward.
struct CopiedGradient {
  double log_p;
  double generated;  // shares of the two ways in its probability; 0 where that is 0
  double copied;
};

template <bool kHasGate, typename T>
static void log_probs_backward_row(const CopyDistributionBackward& p, int64_t r, CopiedWords& words,
                                   CopiedGradient* shares) {
  const CopyDistribution& call = p.call;
  const CopyRow<T> row(call, r);
  const float* grad_output = row_of<float>(p.grad_output, r);
  T* grad_logits = static_cast<T*>(p.grad_logits) + r * call.vocabulary;
  float* grad_copy = p.grad_copy + r * call.positions;
  const double lse = p.lse[r];
  const Shifts shifts = make_shifts<kHasGate>(row, lse);

  // Gradients times shares: what reaches all generated words, and what all copied positions. A word
  // without a share gets no gradient, whatever arrives there.
  double to_generated = 0.0;
  double to_copied = 0.0;
  const bool generates = shifts.generate != kNothing;
  if (generates) {
    Vec sums[kSlots] = {};
    for_vectors(call.vocabulary, [&](int64_t i, auto lanes, int slot) {
      if (slot == 0) {
        prefetch(row.logits + kAhead<T>, i);
        prefetch(grad_output + kAhead<float>, i);
      }
      const Vec logit = load_lanes(row.logits + i, lanes);
      const Vec grad = load_lanes(grad_output + i, lanes);
      sums[slot] += select(logit == broadcast(kMinusInfinity), Vec{}, grad);
    });
    to_generated = total_of(sums);
  }
  words.find<kHasGate>(row);
  CopiedGradient* share = shares;
  for (const CopiedWord& word : words) {
    const WordLogs logs = word_logs<kHasGate>(row, call.vocabulary, word, shifts);
    const double log_p = log_add(logs.generated, logs.copied);
    *share = {log_p, 0.0, 0.0};
    if (log_p != kNothing) {
      const double grad = grad_output[word.token];
      share->generated = std::exp(logs.generated - log_p);
      share->copied = std::exp(logs.copied - log_p);
      to_copied += grad * share->copied;
      if (logs.generated != kNothing) to_generated -= grad * share->copied;
    }
    ++share;
  }

  std::fill_n(grad_copy, call.positions, 0.0f);
  words.for_each(row, [&](int64_t s, int64_t token, float score) {
    const double log_p = shares[words.place(token)].log_p;
    if (log_p == kNothing) return;
    const double grad = grad_output[token];
    if constexpr (kHasGate)
      grad_copy[s] = bounded(grad * bounded(std::exp(shifts.copy - log_p)));
    else
      grad_copy[s] = static_cast<float>(grad * std::exp(score + shifts.copy - log_p));
  });
  const double total = to_generated + to_copied;
  if constexpr (!kHasGate) {
    for (int64_t s = 0; s < row.positions; ++s)
      if (row.tokens[s] >= 0)
        grad_copy[s] -= static_cast<float>(total * softmax_of(row.copy[s], lse));
  }
  if (p.grad_gate) {
    p.grad_gate[r] = static_cast<float>(to_generated * std::exp(row.log_copy) -
                                        to_copied * std::exp(row.log_generate));
  }

  if (generates) {
    const double scale = kHasGate ? to_generated : total;
    const Vec scale_of_all = broadcast(static_cast<float>(scale));
    const Vec lse_of_all = broadcast(static_cast<float>(lse));
    write_row(row.logits, grad_logits, call.vocabulary, p.streams,
              [&](int64_t i, auto lanes, Vec logit) {
                const Vec grad = load_lanes(grad_output + i, lanes);
                return select(logit == broadcast(kMinusInfinity), Vec{}, grad) -
                       scale_of_all * exp_of_negative(logit - lse_of_all);
              });
    share = shares;
    for (const CopiedWord& word : words) {
      const double generated = (share++)->generated;
      if (word.token >= call.vocabulary || generated == 0.0) continue;
      const double softmax = softmax_of(to_float(row.logits[word.token]), lse);
      grad_logits[word.token] =
          from_float<T>(static_cast<float>(grad_output[word.token] * generated - scale * softmax));
    }
  } else {
    std::memset(grad_logits, 0, sizeof(T) * static_cast<size_t>(call.vocabulary));
  }
  words.forget();
}

void copy_distribution_backward(const CopyDistributionBackward& p, int64_t begin, int64_t end) {
  const CopyDistribution& call = p.call;
  for_kind(call, [&](auto element, auto has_gate) {
    using T = decltype(element);
    if (call.targets) {
      for (int64_t r = begin; r < end; ++r) nll_backward_row<has_gate.value, T>(p, r);
      return;
    }
    CopiedWords words(call.extended_size, call.positions);
    Scratch<CopiedGradient> shares(call.positions);
    for (int64_t r = begin; r < end; ++r)
      log_probs_backward_row<has_gate.value, T>(p, r, words, shares.data());
  });
}

}  // namespace FUSED_ATTN_ISA
}  // namespace fused_attn
