// CPU kernels of beam_search: raw pointers, no torch. Compiled once per instruction set.
#pragma once

#include "beam_search/beam_search.h"
#include "common/scratch.h"
#include "common/vec.h"

namespace fused_attn {
namespace FUSED_ATTN_ISA {

// Tokens summed at a time, and read again at a time if one of them may be a candidate.
constexpr int64_t kBlock = 1024;
constexpr int kUnroll = 2;
static_assert(kBlock % (kUnroll * kVec) == 0 && kBeamSearchChunk % kBlock == 0);

// Bytes ahead of the sums that are fetched into the cache: the processor's own prefetcher stops at
// the end of a page, which is one block of fp32.
constexpr int64_t kPrefetch = 4096;
constexpr int64_t kCacheLine = 64;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Whether a running score or a total can be chosen: not -inf and not NaN. Rows of impossible beams
// are not read: at the first step of a search that is all but one of a sentence.
static inline bool is_possible(float score) { return score > kMinusInfinity; }

// --- candidates of a row ------------------------------------------------------------------

// A logit and its token as one integer: the larger logit is the larger key, and among equal ones
// the lower token. -0 counts as 0.
static inline uint64_t make_key(float logit, int64_t token) {
  const uint32_t bits = bits_from_float(logit + 0.0f);
  const uint32_t ordered = bits ^ ((bits >> 31) ? 0xFFFFFFFFu : 0x80000000u);
  return (static_cast<uint64_t>(ordered) << 32) | (0xFFFFFFFFu - static_cast<uint32_t>(token));
}

static inline float key_logit(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return float_from_bits(ordered ^ ((ordered >> 31) ? 0x80000000u : 0xFFFFFFFFu));
}

static inline int64_t key_token(uint64_t key) { return 0xFFFFFFFFu - static_cast<uint32_t>(key); }

// The `capacity` largest keys offered, of logits above `floor`. Once full it is a heap with the
// smallest key on top, so that a new candidate costs log2(capacity) steps whatever the order of
// the logits.
//
// (Not the standard library's heap: instantiated for plain integers here, its code would be
// compiled for this instruction set and might be the copy that the linker keeps for all.)
class TopKeys {
 public:
  TopKeys(uint64_t* keys, int64_t capacity, float floor)
      : keys_(keys), capacity_(capacity), floor_(floor) {}

  // Takes over what `sort` left in `keys`.
  TopKeys(uint64_t* keys, int64_t capacity, int64_t count)
      : keys_(keys), capacity_(capacity), count_(count) {
    if (count_ == capacity_) make_heap();
  }

  int64_t count() const { return count_; }
  bool is_full() const { return count_ == capacity_; }

  // No logit up to this one is among the best: an equal one has the higher token.
  float threshold() const { return is_full() ? key_logit(keys_[0]) : floor_; }

  void offer(uint64_t key) {
    if (!is_full()) {
      keys_[count_++] = key;
      if (is_full()) make_heap();
    } else if (key > keys_[0]) {
      keys_[0] = key;
      sift_down(0, count_);
    }
  }

  // Largest first. The heap is gone afterwards.
  void sort() {
    if (!is_full()) make_heap();
    for (int64_t last = count_ - 1; last > 0; --last) {
      const uint64_t smallest = keys_[0];
      keys_[0] = keys_[last];
      keys_[last] = smallest;
      sift_down(0, last);
    }
  }

 private:
  void make_heap() {
    for (int64_t i = count_ / 2 - 1; i >= 0; --i) sift_down(i, count_);
  }

  // Which child is smaller is a toss-up, so it is computed rather than branched on.
  void sift_down(int64_t hole, int64_t count) {
    const uint64_t key = keys_[hole];
    int64_t child = 2 * hole + 1;
    for (; child + 1 < count; child = 2 * hole + 1) {
      child += static_cast<int64_t>(keys_[child + 1] < keys_[child]);
      if (key <= keys_[child]) {
        keys_[hole] = key;
        return;
      }
      keys_[hole] = keys_[child];
      hole = child;
    }
    if (child < count && keys_[child] < key) {
      keys_[hole] = keys_[child];
      hole = child;
    }
    keys_[hole] = key;
  }

  uint64_t* keys_;
  int64_t capacity_;
  int64_t count_ = 0;
  float floor_ = kMinusInfinity;
};

// Offers the logits of tokens first_token, first_token + 1, ... but for the end of sequence.
template <typename T>
static void offer_block(const T* logits, int64_t count, int64_t first_token, int64_t eos_token,
                        TopKeys& best) {
  float threshold = best.threshold();
  for (int64_t i = 0; i < count; i += kVec) {
    const Vec x =
        i + kVec <= count ? load(logits + i) : load_partial(logits + i, count - i, kMinusInfinity);
    for (uint32_t lanes = greater_lanes(x, broadcast(threshold)); lanes != 0; lanes &= lanes - 1) {
      const int64_t j = i + __builtin_ctz(lanes);
      const float logit = to_float(logits[j]);
      if (logit > threshold && first_token + j != eos_token) {
        best.offer(make_key(logit, first_token + j));
        threshold = best.threshold();
      }
    }
  }
}

// --- sum of exponentials --------------------------------------------------------------------

struct BlockSum {
  Vec sum;
  Vec max;
};

// For j = 0..7, twice: the bits of 2^(j / 8) less j << 20, so that adding (8 n + j) << 20 gives
// those of 2^(n + j / 8).
alignas(64) constexpr int32_t kEighthPowers[16] = {
    0x3F800000, 0x3F7B95C2, 0x3F7837F0, 0x3F75FED7, 0x3F7504F3, 0x3F75672A, 0x3F7744FD, 0x3F7AC0C7,
    0x3F800000, 0x3F7B95C2, 0x3F7837F0, 0x3F75FED7, 0x3F7504F3, 0x3F75672A, 0x3F7744FD, 0x3F7AC0C7};

// 2^(i / 8) in each lane for the integer i in the low bits of 1.5 * 2^23 + i.
FUSED_ATTN_INLINE Vec power_of_two_eighths(Vec shifted) {
  const VecI index = reinterpret_cast<VecI>(shifted);
  VecI power;
#if defined(FUSED_ATTN_ISA_AVX512)
  power = reinterpret_cast<VecI>(
      _mm512_permutexvar_epi32(reinterpret_cast<__m512i>(index), _mm512_load_si512(kEighthPowers)));
#elif defined(FUSED_ATTN_ISA_AVX2)
  power = reinterpret_cast<VecI>(_mm256_permutevar8x32_epi32(
      _mm256_load_si256(reinterpret_cast<const __m256i*>(kEighthPowers)),
      reinterpret_cast<__m256i>(index)));
#else
  for (int i = 0; i < kVec; ++i) power[i] = kEighthPowers[index[i] & 7];
#endif
  return as_vec(power + (index << 20));
}

// sum + e^y for y <= 64, to 1e-7 of e^y; below -87 it adds about 1e-38, and NaN stays NaN.
//
// e^y = 2^(i / 8) * 2^(f / 8) with i an integer and |f| <= 1/2. The table is looked up on a port
// that the arithmetic leaves idle, and saves two degrees of the polynomial.
FUSED_ATTN_INLINE Vec add_exp(Vec sum, Vec y) {
  constexpr float kEighths = 11.541560327f;  // 8 / ln 2
  // NaN is the second operand, which max() returns.
  const Vec clamped = max(broadcast(-87.0f), y);
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum.
  const Vec magic = broadcast(12582912.0f);
  const Vec shifted = clamped * kEighths + magic;
  const Vec f = clamped * kEighths - (shifted - magic);
  // 2^(f / 8): near-minimax in the relative error, exact at 0.
  Vec p = broadcast(1.0839104652404785e-4f);
  p = p * f + 3.7540255580097437e-3f;
  p = p * f + 8.664340525865555e-2f;
  p = p * f + 1.0f;
  return p * power_of_two_eighths(shifted) + sum;
}

// Sum of e^(logit - reference) and maximum by lane. A NaN is in the sum and not in the maximum.
template <typename T>
static inline BlockSum sum_block(const T* logits, int64_t count, float reference) {
  Vec sums[kUnroll] = {};
  Vec maxima[kUnroll];
  for (int u = 0; u < kUnroll; ++u) maxima[u] = broadcast(kMinusInfinity);
  const Vec r = broadcast(reference);
  int64_t i = 0;
  for (; i + kUnroll * kVec <= count; i += kUnroll * kVec) {
    constexpr int64_t kStep = kUnroll * kVec * sizeof(T);
    const char* ahead = reinterpret_cast<const char*>(logits + i) + kPrefetch;
    for (int64_t line = 0; line < kStep; line += kCacheLine) __builtin_prefetch(ahead + line);
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const Vec x = load(logits + i + u * kVec);
      maxima[u] = max(x, maxima[u]);
      sums[u] = add_exp(sums[u], x - r);
    }
  }
  for (; i < count; i += kVec) {
    const Vec x =
        i + kVec <= count ? load(logits + i) : load_partial(logits + i, count - i, kMinusInfinity);
    maxima[0] = max(x, maxima[0]);
    sums[0] = add_exp(sums[0], x - r);
  }
  for (int u = 1; u < kUnroll; ++u) {
    sums[0] += sums[u];
    maxima[0] = max(maxima[0], maxima[u]);
  }
  return {sums[0], maxima[0]};
}

// The largest logit; NaN where there is one.
template <typename T>
static float max_or_nan(const T* logits, int64_t count) {
  Vec maximum = broadcast(kMinusInfinity);
  Vec nan = {};  // 0, or NaN
  for (int64_t i = 0; i < count; i += kVec) {
    const Vec x =
        i + kVec <= count ? load(logits + i) : load_partial(logits + i, count - i, kMinusInfinity);
    maximum = max(x, maximum);
    nan += select(x != x, x, Vec{});
  }
  return reduce_max(maximum) + reduce_add(nan);
}

// The sum of a chunk; leaves the maxima of each block by lane in `maxima`, kVec a block.
//
// The exponentials are relative to a reference that need not be the maximum, only near enough
// that nothing overflows and that the largest does not vanish: a block is summed and its maxima
// taken in one pass, and done again with its maximum as the reference if that exceeds the old
// one by more than kSlack. So sum * e^reference is at least the largest exponential of the blocks
// that set the reference, and what the clamp adds for a logit far below is at most 1e-37 of it.
template <typename T>
static BeamSearchChunkSum sum_chunk(const T* logits, int64_t count, float* maxima) {
  constexpr float kSlack = 32.0f;
  typedef double VecD __attribute__((vector_size(kVec * 8)));
  VecD sum = {};
  float reference = kMinusInfinity;
  for (int64_t begin = 0; begin < count; begin += kBlock, maxima += kVec) {
    const T* block = logits + begin;
    const int64_t size = count - begin < kBlock ? count - begin : kBlock;
    if (reference == kMinusInfinity) {
      reference = max_or_nan(block, size);
      if (reference == kMinusInfinity) {
        store(maxima, broadcast(kMinusInfinity));
        continue;
      }
    }
    BlockSum part = sum_block(block, size, reference);
    if (greater_lanes(part.max, broadcast(reference + kSlack)) != 0) {
      const float maximum = reduce_max(part.max);
      sum *= std::exp(static_cast<double>(reference) - maximum);
      reference = maximum;
      part = sum_block(block, size, reference);
    }
    sum += __builtin_convertvector(part.sum, VecD);
    store(maxima, part.max);
  }
  double total = 0.0;
  for (int lane = 0; lane < kVec; ++lane) total += sum[lane];
  return {total, reference};
}

// --- selection ------------------------------------------------------------------------------

// A bound below which no candidate can be: the maxima are logits of different tokens, so at least
// K of the tokens that go on reach the one of rank K + 1. `keys` has room for K + 1.
static float candidate_floor(const float* maxima, int64_t count, uint64_t* keys, int64_t beams) {
  if (count <= beams) return kMinusInfinity;
  TopKeys best(keys, beams + 1, kMinusInfinity);
  offer_block(maxima, count, 0, -1, best);
  if (!best.is_full()) return kMinusInfinity;
  const float reached = best.threshold();
  // Candidates are above the floor, and those that reach the bound are among them.
  return reached - (std::fabs(reached) * 1e-6f + 1e-30f);
}

// The best of `count` tokens from first_token on, largest first; returns how many. Only blocks
// whose maximum is among the best so far are read again.
template <typename T>
static int64_t select(const T* logits, int64_t count, int64_t first_token, int64_t eos_token,
                      const float* maxima, uint64_t* keys, int64_t beams) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  TopKeys best(keys, beams, candidate_floor(maxima, blocks * kVec, keys, beams));
  for (int64_t i = 0; i < blocks; ++i) {
    if (greater_lanes(load(maxima + i * kVec), broadcast(best.threshold())) == 0) continue;
    const int64_t begin = i * kBlock;
    const int64_t size = count - begin < kBlock ? count - begin : kBlock;
    offer_block(logits + begin, size, first_token + begin, eos_token, best);
  }
  best.sort();
  return best.count();
}

template <typename T>
static void scan_part(const BeamSearch& p, int64_t part) {
  const int64_t end = beam_search_part_begin(p, part + 1);
  p.part_counts[part] = 0;
  Scratch<float> maxima((p.vocabulary + kBlock - 1) / kBlock * kVec);
  for (int64_t i = beam_search_part_begin(p, part); i < end;) {
    const int64_t row = i / p.chunks;
    const int64_t next_row = (row + 1) * p.chunks;
    if (!is_possible(p.scores[row])) {
      i = next_row;
      continue;
    }
    const T* logits = static_cast<const T*>(p.logits) + row / p.beams * p.stride_batch +
                      row % p.beams * p.stride_beam;
    const int64_t first_chunk = i % p.chunks;
    const int64_t first_token = first_chunk * kBeamSearchChunk;
    int64_t token = first_token;
    for (; i < end && i < next_row; ++i) {
      const int64_t rest = p.vocabulary - token;
      const int64_t count = rest < kBeamSearchChunk ? rest : kBeamSearchChunk;
      float* chunk_maxima = maxima.data() + (token - first_token) / kBlock * kVec;
      p.chunk_sums[i] = sum_chunk(logits + token, count, chunk_maxima);
      token += count;
    }
    const bool is_start = first_chunk == 0;
    uint64_t* keys = is_start ? p.row_keys + row * p.slot : p.part_keys + part * p.slot;
    (is_start ? p.row_counts[row] : p.part_counts[part]) =
        select(logits + first_token, token - first_token, first_token, p.eos_token, maxima.data(),
               keys, p.beams);
  }
}

void beam_search_scan(const BeamSearch& p, int64_t part) {
  switch (p.dtype) {
    case DType::kFloat32:
      return scan_part<float>(p, part);
    case DType::kFloat16:
      return scan_part<Half>(p, part);
    case DType::kBFloat16:
      return scan_part<BFloat16>(p, part);
  }
}

// --- ranking of a sentence ------------------------------------------------------------------

// log of the sum of e^logit over a row; not finite where a logit is NaN or +inf or all are -inf.
static double log_sum_exp(const BeamSearchChunkSum* chunks, int64_t count) {
  double reference = -std::numeric_limits<double>::infinity();
  for (int64_t c = 0; c < count; ++c)
    if (chunks[c].reference > reference) reference = chunks[c].reference;
  double sum = 0.0;
  for (int64_t c = 0; c < count; ++c) {
    const double shift = chunks[c].reference - reference;
    sum += chunks[c].reference == kMinusInfinity ? chunks[c].sum : chunks[c].sum * std::exp(shift);
  }
  return reference + std::log(sum);
}

struct Candidate {
  float total;
  uint32_t token;
};

// The candidates of one beam that are possible, best first.
struct BeamCandidates {
  const Candidate* next;
  const Candidate* end;
};

static bool contains(const Candidate* begin, const Candidate* end, int64_t token) {
  for (const Candidate* c = begin; c != end; ++c)
    if (c->token == token) return true;
  return false;
}

template <typename T>
static float logit_at(const BeamSearch& p, int64_t row, int64_t token) {
  const T* logits = static_cast<const T*>(p.logits) + row / p.beams * p.stride_batch +
                    row % p.beams * p.stride_beam;
  return to_float(logits[token]);
}

static float logit_at(const BeamSearch& p, int64_t row, int64_t token) {
  switch (p.dtype) {
    case DType::kFloat32:
      return logit_at<float>(p, row, token);
    case DType::kFloat16:
      return logit_at<Half>(p, row, token);
    case DType::kBFloat16:
      return logit_at<BFloat16>(p, row, token);
  }
  return 0.0f;
}

// A row's possible candidates, its K best and the end of sequence, best first. Returns how many.
static int64_t row_candidates(const BeamSearch& p, int64_t row, Candidate* candidates) {
  if (!is_possible(p.scores[row])) return 0;
  uint64_t* keys = p.row_keys + row * p.slot;
  int64_t key_count = p.row_counts[row];
  for (int64_t part = 1; part < p.parts; ++part) {
    const int64_t begin = beam_search_part_begin(p, part);
    if (begin <= row * p.chunks || begin >= (row + 1) * p.chunks) continue;
    TopKeys best(keys, p.beams, key_count);
    for (int64_t i = 0; i < p.part_counts[part]; ++i) best.offer(p.part_keys[part * p.slot + i]);
    best.sort();
    key_count = best.count();
  }

  const double normaliser = log_sum_exp(p.chunk_sums + row * p.chunks, p.chunks);
  const double score = p.scores[row];
  int64_t count = 0;
  // In this order, so that candidates of equal rows tie exactly when their score + logit do.
  const auto append = [&](float logit, int64_t token) {
    const float total = static_cast<float>((score + logit) - normaliser);
    if (is_possible(total)) candidates[count++] = {total, static_cast<uint32_t>(token)};
  };
  const float eos_logit = logit_at(p, row, p.eos_token);
  const uint64_t eos_key = make_key(eos_logit, p.eos_token);
  bool is_eos_due = true;
  for (int64_t i = 0; i < key_count; ++i) {
    const uint64_t key = keys[i];
    if (is_eos_due && eos_key > key) {
      append(eos_logit, p.eos_token);
      is_eos_due = false;
    }
    append(key_logit(key), key_token(key));
  }
  if (is_eos_due) append(eos_logit, p.eos_token);
  return count;
}

static void rank_sentence(const BeamSearch& p, int64_t b, Candidate* candidates,
                          BeamCandidates* beams) {
  const int64_t K = p.beams;
  const int64_t width = K + 1;
  int64_t* tokens = p.tokens + b * K;
  int64_t* parents = p.parents + b * K;
  float* next_scores = p.next_scores + b * K;
  float* finished_scores = p.finished_scores + b * K;
  int64_t* finished_parents = p.finished_parents + b * K;
  for (int64_t k = 0; k < K; ++k) {
    Candidate* first = candidates + k * width;
    beams[k] = {first, first + row_candidates(p, b * K + k, first)};
    finished_scores[k] = kMinusInfinity;
    finished_parents[k] = 0;
  }

  // Merge the beams: the best total, and among equal ones the lower beam.
  int64_t going_on = 0;
  int64_t rank = 0;
  for (; going_on < K; ++rank) {
    int64_t parent = -1;
    float total = kMinusInfinity;
    for (int64_t k = 0; k < K; ++k) {
      if (beams[k].next != beams[k].end && beams[k].next->total > total) {
        parent = k;
        total = beams[k].next->total;
      }
    }
    if (parent < 0) break;
    const int64_t token = (beams[parent].next++)->token;
    if (token != p.eos_token) {
      tokens[going_on] = token;
      parents[going_on] = parent;
      next_scores[going_on++] = total;
    } else if (rank < K) {
      finished_scores[rank] = total;
      finished_parents[rank] = parent;
    }
  }

  // Impossible candidates in the order of beams and tokens, if there are not enough others. Each
  // row then has fewer than K possible ones that go on, and `candidates` holds all of them.
  for (int64_t k = 0; k < K && going_on < K; ++k) {
    const Candidate* first = candidates + k * width;
    for (int64_t token = 0; token < p.vocabulary && going_on < K; ++token) {
      if (token == p.eos_token || contains(first, beams[k].end, token)) continue;
      tokens[going_on] = token;
      parents[going_on] = k;
      next_scores[going_on++] = kMinusInfinity;
    }
  }
  for (; going_on < K; ++going_on) {  // a vocabulary of the end of sequence alone
    tokens[going_on] = p.eos_token;
    parents[going_on] = 0;
    next_scores[going_on] = kMinusInfinity;
  }
}

void beam_search_rank(const BeamSearch& p, int64_t begin, int64_t end) {
  Scratch<Candidate> candidates(p.beams * (p.beams + 1));
  Scratch<BeamCandidates> beams(p.beams);
  for (int64_t b = begin; b < end; ++b) rank_sentence(p, b, candidates.data(), beams.data());
}

}  // namespace FUSED_ATTN_ISA
}  // namespace fused_attn
