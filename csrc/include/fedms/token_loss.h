// The log-probability of one token a position under a frozen head, and its gradient, without all logits at once.
//
//   z[i][v] = scale * (sum over d of hidden[i][d] * weight[v][d] + bias[v]),   capped: z = cap * tanh(z / cap)
//   log_p[i] = z[i][labels[i]] - log(sum over v of exp(z[i][v]))
//
// The logits come from the int8 weight where there is one. The gradient always comes from the float one: its right factor,
// onehot - p, has one value near 1 and many small ones that hold most of the probability, and would vanish in int8. Beside an
// int8 weight, a CPU that multiplies bfloat16 with AVX-512 rounds p and the float weight to bfloat16 for it, whose 8 significant
// bits are there for small values as well; the label's own row and all sums stay in float.
//
// All matrices are row-major and dense. The results are bitwise the same for any number of threads and any chunk.
#pragma once

#include <cstdint>

#include "fedms/int8.h"

namespace fedms {

struct TokenHead {
  int64_t vocabulary, width;
  const float* weight;    // (vocabulary, width)
  const float* bias;      // (vocabulary,) or null
  Int8Weight quantized;   // of the same weight, with the bias; `packed` is null where the logits come from `weight`
  float scale = 1;
  float cap = 0;          // 0: the logits are not capped
};

struct TokenLogProb {
  float* log_p;        // (n,)
  float* confidence;   // (n, 2): entropy in nats, and the logarithm of the largest probability
  int64_t* best;       // (n,): the first token of the largest probability
  float* gradient;     // (n, width): of log_p[i] with respect to hidden[i]; or null
};

// Tokens whose logits are in memory at the same time. The sums of exponentials are made as the vocabulary is passed through
// (online softmax: Milakov and Gimelshein, arXiv 1805.02867), so that logits come from the cache and go nowhere.
constexpr int64_t TOKEN_STRETCH = 1536;

// hidden (n, width), labels (n,). `work` holds chunk * TOKEN_STRETCH floats.
// Throws std::invalid_argument for a label outside the vocabulary, and as int8_unpack does.
void token_log_prob(const TokenHead& head, int64_t n, const float* hidden, const int64_t* labels, int64_t chunk,
                    float* work, const TokenLogProb& out);

}  // namespace fedms
