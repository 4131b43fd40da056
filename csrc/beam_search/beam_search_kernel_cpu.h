// CPU kernels of beam_search: raw pointers, no torch. Compiled once per instruction set.
#pragma once

#include "beam_search/beam_search.h"
#include "common/scratch.h"
#include "common/sum_exp.h"
#include "common/vec.h"

namespace fused_attn {
namespace FUSED_ATTN_ISA {

static_assert(kBeamSearchChunk % kSumBlock == 0);

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

// Offers the logits of tokens first_token, first_token + 1, ... but for those whose bit is set in
// `excluded`; null where there are none.
template <typename T>
static void offer_block(const T* logits, int64_t count, int64_t first_token,
                        const uint64_t* excluded, TopKeys& best) {
  float threshold = best.threshold();
  for (int64_t i = 0; i < count; i += kVec) {
    const Vec x =
        i + kVec <= count ? load(logits + i) : load_partial(logits + i, count - i, kMinusInfinity);
    for (uint32_t lanes = greater_lanes(x, broadcast(threshold)); lanes != 0; lanes &= lanes - 1) {
      const int64_t j = i + __builtin_ctz(lanes);
      const int64_t token = first_token + j;
      const float logit = to_float(logits[j]);
      if (logit > threshold &&
          (excluded == nullptr || (excluded[token / 64] >> (token % 64) & 1) == 0)) {
        best.offer(make_key(logit, token));
        threshold = best.threshold();
      }
    }
  }
}

// --- rows -----------------------------------------------------------------------------------

// A row of the logits with its sentence's vocabulary. Its tokens are counted from 0 in that
// vocabulary, here called places; where there is no shortlist they are the tokens themselves.
struct Row {
  int64_t index;  // of the row
  int64_t sentence;
  const int64_t* list;  // null where there is no shortlist
  int64_t size;         // of the vocabulary
  int64_t forced;       // the token, or negative

  int64_t token(int64_t place) const { return list == nullptr ? place : list[place]; }

  // -1 where the token is none of the vocabulary.
  int64_t place(int64_t token) const {
    if (token < 0) return -1;
    if (list == nullptr) return token < size ? token : -1;
    int64_t begin = 0;
    int64_t end = size;
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if (list[middle] < token)
        begin = middle + 1;
      else
        end = middle;
    }
    return begin < size && list[begin] == token ? begin : -1;
  }
};

static Row make_row(const BeamSearch& p, int64_t index) {
  const int64_t b = index / p.beams;
  const bool has_list = p.list != nullptr;
  return {index, b, has_list ? p.list + b * p.list_stride : nullptr,
          has_list ? p.list_sizes[b] : p.vocabulary,
          p.forced_tokens == nullptr ? -1 : p.forced_tokens[b]};
}

static double temperature_of(const BeamSearch& p, const Row& row) {
  return p.temperature == nullptr ? 1.0 : static_cast<double>(p.temperature[row.sentence]);
}

template <typename T>
static const T* logits_of(const BeamSearch& p, int64_t row) {
  return static_cast<const T*>(p.logits) + row / p.beams * p.stride_batch +
         row % p.beams * p.stride_beam;
}

// Calls `visit(edit, place)` for the row's edits of tokens of its vocabulary.
template <typename Visit>
FUSED_ATTN_INLINE void for_each_edit(const BeamSearch& p, const Row& row, const Visit& visit) {
  for (int64_t edit = row.index * p.edits; edit < (row.index + 1) * p.edits; ++edit) {
    if (p.edit_factors[edit] == 1.0f && p.edit_offsets[edit] == 0.0f) continue;
    const int64_t place = row.place(p.edit_tokens[edit]);
    if (place >= 0) visit(edit, place);
  }
}

// Calls `visit(place)` for what is no candidate by its logit: edited tokens and the end of
// sequence.
template <typename Visit>
FUSED_ATTN_INLINE void for_each_excluded(const BeamSearch& p, const Row& row, const Visit& visit) {
  const int64_t eos = row.place(p.eos_token);
  if (eos >= 0) visit(eos);
  for_each_edit(p, row, [&](int64_t, int64_t place) { visit(place); });
}

// --- selection ------------------------------------------------------------------------------

// A bound below which no candidate can be: the maxima are logits of different tokens, so at least
// K of the tokens that go on reach the one of rank K. `keys` has room for K.
static float candidate_floor(const float* maxima, int64_t count, uint64_t* keys, int64_t beams) {
  if (count < beams) return kMinusInfinity;
  TopKeys best(keys, beams, kMinusInfinity);
  offer_block(maxima, count, 0, nullptr, best);
  if (!best.is_full()) return kMinusInfinity;
  const float reached = best.threshold();
  // Candidates are above the floor, and those that reach the bound are among them.
  return reached - (std::fabs(reached) * 1e-6f + 1e-30f);
}

// A part of a row: the logits of `count` places from `first` on.
template <typename T>
struct Portion {
  const T* logits;
  int64_t first;
  int64_t count;
};

// Leaves the best places of a portion in `keys`, the largest first; returns how many. Only blocks
// whose maximum is among the best so far are read again. `excluded` and `bounds` are scratch: the
// former all 0, and so again afterwards.
template <typename T>
static int64_t select(const BeamSearch& p, const Row& row, const Portion<T>& portion,
                      const float* maxima, float* bounds, uint64_t* excluded, uint64_t* keys) {
  const int64_t blocks = (portion.count + kSumBlock - 1) / kSumBlock;
  std::memcpy(bounds, maxima, sizeof(float) * static_cast<size_t>(blocks * kVec));
  for_each_excluded(p, row, [&](int64_t place) {
    excluded[place / 64] |= uint64_t{1} << (place % 64);
    const int64_t i = place - portion.first;
    if (i < 0 || i >= portion.count) return;
    // A maximum that is no candidate bounds nothing.
    const int64_t lane = i / kSumBlock * kVec + i % kVec;
    if (to_float(portion.logits[i]) == maxima[lane]) bounds[lane] = kMinusInfinity;
  });
  TopKeys best(keys, p.beams, candidate_floor(bounds, blocks * kVec, keys, p.beams));
  for (int64_t i = 0; i < blocks; ++i) {
    if (greater_lanes(load(maxima + i * kVec), broadcast(best.threshold())) == 0) continue;
    const int64_t begin = i * kSumBlock;
    const int64_t size = portion.count - begin < kSumBlock ? portion.count - begin : kSumBlock;
    offer_block(portion.logits + begin, size, portion.first + begin, excluded, best);
  }
  best.sort();
  for_each_excluded(p, row, [&](int64_t place) { excluded[place / 64] = 0; });
  return best.count();
}

template <typename T>
static void scan_part(const BeamSearch& p, int64_t part) {
  const int64_t end = beam_search_part_begin(p, part + 1);
  p.part_counts[part] = 0;
  const int64_t blocks = (p.longest + kSumBlock - 1) / kSumBlock;
  Scratch<float> maxima(2 * blocks * kVec);
  Scratch<uint64_t> excluded(p.longest / 64 + 1);
  std::memset(excluded.data(), 0, sizeof(uint64_t) * static_cast<size_t>(p.longest / 64 + 1));
  Scratch<T> gathered(p.list == nullptr ? 0 : p.longest);
  for (int64_t i = beam_search_part_begin(p, part); i < end;) {
    const Row row = make_row(p, i / p.chunks);
    const int64_t next_row = (row.index + 1) * p.chunks;
    const int64_t first_chunk = i % p.chunks;
    const bool is_start = first_chunk == 0;
    int64_t& found = is_start ? p.row_counts[row.index] : p.part_counts[part];
    found = 0;
    if (!is_possible(p.scores[row.index])) {
      i = next_row;
      continue;
    }
    const T* logits = logits_of<T>(p, row.index);
    const int64_t first = first_chunk * kBeamSearchChunk;
    Portion<T> portion{row.list == nullptr ? logits + first : gathered.data(), first, 0};
    for (; i < end && i < next_row; ++i) {
      const int64_t place = first + portion.count;
      const int64_t rest = row.size > place ? row.size - place : 0;
      const int64_t count = rest < kBeamSearchChunk ? rest : kBeamSearchChunk;
      if (row.list != nullptr)
        for (int64_t j = 0; j < count; ++j)
          gathered.data()[portion.count + j] = logits[row.list[place + j]];
      const ExpSum sum = sum_exp(portion.logits + portion.count, count, temperature_of(p, row),
                                 maxima.data() + portion.count / kSumBlock * kVec);
      p.chunk_sums[i] = {sum.sum, sum.reference};
      portion.count += count;
    }
    if (row.forced >= 0) continue;
    found = select(p, row, portion, maxima.data(), maxima.data() + blocks * kVec, excluded.data(),
                   (is_start ? p.row_keys + row.index * p.slot : p.part_keys + part * p.slot));
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

// log of the sum of e^(logit / temperature) over a row; NaN or +inf where a logit is NaN or +inf,
// -inf where all are.
static double log_sum_exp(const BeamSearchChunkSum* chunks, int64_t count) {
  const double none = -std::numeric_limits<double>::infinity();
  double reference = none;
  for (int64_t c = 0; c < count; ++c)
    if (chunks[c].reference > reference) reference = chunks[c].reference;
  double sum = 0.0;
  for (int64_t c = 0; c < count; ++c)
    if (chunks[c].reference != none)
      sum += chunks[c].sum * std::exp(chunks[c].reference - reference);
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

static float logit_at(const BeamSearch& p, const Row& row, int64_t place) {
  const int64_t token = row.token(place);
  switch (p.dtype) {
    case DType::kFloat32:
      return to_float(logits_of<float>(p, row.index)[token]);
    case DType::kFloat16:
      return to_float(logits_of<Half>(p, row.index)[token]);
    case DType::kBFloat16:
      return to_float(logits_of<BFloat16>(p, row.index)[token]);
  }
  return 0.0f;
}

// Puts the keys of all parts of a row together, the largest first. Returns how many.
static int64_t merge_parts(const BeamSearch& p, int64_t row) {
  uint64_t* keys = p.row_keys + row * p.slot;
  int64_t count = p.row_counts[row];
  for (int64_t part = 1; part < p.parts; ++part) {
    const int64_t begin = beam_search_part_begin(p, part);
    if (begin <= row * p.chunks || begin >= (row + 1) * p.chunks) continue;
    TopKeys best(keys, p.beams, count);
    for (int64_t i = 0; i < p.part_counts[part]; ++i) best.offer(p.part_keys[part * p.slot + i]);
    best.sort();
    count = best.count();
  }
  return count;
}

// A row's possible candidates, its K best that go on and an end of sequence that is before the last
// of them, best first. Returns how many. `edited` has room for K + 1 keys.
static int64_t row_candidates(const BeamSearch& p, int64_t index, uint64_t* edited,
                              Candidate* candidates, bool& is_invalid) {
  if (!is_possible(p.scores[index])) return 0;
  const double normaliser = log_sum_exp(p.chunk_sums + index * p.chunks, p.chunks);
  if (!(normaliser < std::numeric_limits<double>::infinity())) {
    is_invalid = true;
    return 0;
  }
  const Row row = make_row(p, index);
  const double temperature = temperature_of(p, row);
  const double score = p.scores[index];
  const int64_t forced = row.forced < 0 ? -1 : row.place(row.forced);
  if (row.forced >= 0 && forced < 0) return 0;

  // Edited tokens by their totals, and whether those that enter below by their logits are among
  // them. As no total is known there, these are few.
  const int64_t eos = row.place(p.eos_token);
  bool is_eos_edited = false;
  bool is_forced_edited = false;
  TopKeys best(edited, p.beams + 1, kMinusInfinity);
  for_each_edit(p, row, [&](int64_t edit, int64_t place) {
    is_eos_edited |= place == eos;
    is_forced_edited |= place == forced;
    if (forced >= 0 && place != forced) return;
    const double factor = p.edit_factors[edit];
    const double logit = logit_at(p, row, place) / temperature;
    const float total =
        static_cast<float>((score + factor * (logit - normaliser)) + p.edit_offsets[edit]);
    if (is_possible(total)) best.offer(make_key(total, place));
  });
  best.sort();

  // The others by their logits; the row's list has room for one more, the end of sequence.
  uint64_t* keys = p.row_keys + index * p.slot;
  int64_t count = 0;
  if (forced >= 0) {
    if (!is_forced_edited) keys[count++] = make_key(logit_at(p, row, forced), forced);
  } else {
    count = merge_parts(p, index);
    if (eos >= 0 && !is_eos_edited) {
      const uint64_t eos_key = make_key(logit_at(p, row, eos), eos);
      int64_t i = count++;
      for (; i > 0 && keys[i - 1] < eos_key; --i) keys[i] = keys[i - 1];
      keys[i] = eos_key;
    }
  }

  int64_t found = 0;
  int64_t going_on = 0;
  int64_t next = 0;
  int64_t next_edited = 0;
  while (going_on < p.beams) {
    float total = kMinusInfinity;
    // In this order, so that candidates of equal rows tie exactly when their score + logit do.
    if (next < count)
      total = static_cast<float>((score + key_logit(keys[next]) / temperature) - normaliser);
    const float edited_total =
        next_edited < best.count() ? key_logit(edited[next_edited]) : kMinusInfinity;
    const bool is_edited = edited_total > total || !is_possible(total);
    if (is_edited) total = edited_total;
    if (!is_possible(total)) break;
    const int64_t place = key_token(is_edited ? edited[next_edited++] : keys[next++]);
    candidates[found++] = {total, static_cast<uint32_t>(row.token(place))};
    if (place != eos) ++going_on;
  }
  return found;
}

static void rank_sentence(const BeamSearch& p, int64_t b, uint64_t* edited, Candidate* candidates,
                          BeamCandidates* beams) {
  const int64_t K = p.beams;
  const int64_t width = K + 1;
  int64_t* tokens = p.tokens + b * K;
  int64_t* parents = p.parents + b * K;
  float* next_scores = p.next_scores + b * K;
  float* finished_scores = p.finished_scores + b * K;
  int64_t* finished_parents = p.finished_parents + b * K;
  bool is_invalid = false;
  for (int64_t k = 0; k < K; ++k) {
    Candidate* first = candidates + k * width;
    beams[k] = {first, first + row_candidates(p, b * K + k, edited, first, is_invalid)};
    finished_scores[k] = kMinusInfinity;
    finished_parents[k] = 0;
  }
  p.invalid[b] = is_invalid;

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
  Scratch<uint64_t> edited(p.beams + 1);
  for (int64_t b = begin; b < end; ++b)
    rank_sentence(p, b, edited.data(), candidates.data(), beams.data());
}

}  // namespace FUSED_ATTN_ISA
}  // namespace fused_attn
