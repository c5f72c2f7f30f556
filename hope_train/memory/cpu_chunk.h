// One chunk of all five MLP memories for one head of one sequence, forward; cpu_chunk_backward.h has the backward.

#pragma once

#include <cmath>
#include <type_traits>

#include "cpu_pairs.h"

namespace hope {

constexpr int SCALARS = 2, MATRICES = 3, BOXES = 5, ETA = 0, ALPHA = 1, K = 2, V = 3, MEM = 4;

struct Rule {
  float eta_max, eta_bias, alpha_bias, factor, clamp;  // clamp: infinite where there is none
  bool normalize_v, normalize_q;
};

// The weights of one head and sequence, or of the initial states of one head, with their transposes.
struct Weights {
  const float *w2, *w1[MATRICES], *w1s[SCALARS];
  float *w2_turned[BOXES], *w1_turned[MATRICES];

  void turn(int64_t width, int64_t hidden, Arena& arena) {
    for (int p = 0; p < BOXES; p++) {
      w2_turned[p] = arena.take(width * hidden);
      transpose(w2 + p * hidden * width, width, w2_turned[p], hidden, hidden, width);
    }
    for (int m = 0; m < MATRICES; m++) {
      w1_turned[m] = arena.take(width * hidden);
      transpose(w1[m], hidden, w1_turned[m], width, width, hidden);
    }
  }
};

struct Changes {
  float *w2, *w1[MATRICES], *w1s[SCALARS];
};

// What is known of one box inside a chunk: [C, E] and [C, N] (one column for eta and alpha).
struct Box {
  float *at_k, *h, *slope, *bend, *hv, *slope_v, *back, *b2, *moved2;  // E; bend: the slope's slope
  float *y, *g, *b1, *r;                            // N or 1
  float *a, *system, *rate, *squares;               // A = ratio (h . h), (I + rate A)^-1
};

// One head of one sequence. Where it is `fresh`, `now` is `init` itself: nothing has moved from it, and products
// with both are one.
class Chunk {
 public:
  Chunk(const Rule& rule, int64_t tokens, int64_t width, int64_t hidden, const Weights& now, const Weights& init,
        bool fresh, Arena& arena)
      : rule(rule), C(tokens), N(width), E(hidden), now(now), init(init), fresh(fresh), arena(arena) {
    turned = arena.take(C * std::max(N, E));
  }

  // Keys, values, rates, decays; and the solve that all rows of W2 share.
  void begin(const float* z_from, int64_t z_row) {
    z = arena.take(C * N);
    for (int64_t t = 0; t < C; t++) std::memcpy(z + t * N, z_from + t * z_row, N * sizeof(float));
    for (int p = 0; p < MEM; p++) {
      z_slope[p] = arena.take(C * E);
      z_h[p] = arena.take(C * E);
      multiply<false>(C, E, N, z, N, 1, now.w2_turned[p], z_slope[p]);
      activate(z_slope[p], z_h[p], z_slope[p]);
    }
    float* values[2];
    for (int m = 0; m < 2; m++) {
      values[m] = arena.take(C * N);
      std::memcpy(values[m], z, C * N * sizeof(float));
      multiply<true>(C, N, E, z_h[SCALARS + m], E, 1, now.w1_turned[m], values[m]);
    }
    k_norm = arena.take(C), v_norm = arena.take(C);
    k = arena.take(C * N), v = values[1];
    normalise(values[0], k, k_norm);
    if (rule.normalize_v) {
      v = arena.take(C * N);
      normalise(values[1], v, v_norm);
    }
    for (float** vector : {&eta, &keep, &cum}) *vector = arena.take(C);
    previous = arena.take(C + 1), current = previous + 1;  // a token's previous decay is the current one of that before
    double total = 0;
    for (int64_t t = 0; t < C; t++) {
      eta[t] = dot(z_h[ETA] + t * E, now.w1s[ETA], E) + rule.eta_bias;
      const float a = dot(z_h[ALPHA] + t * E, now.w1s[ALPHA], E) + rule.alpha_bias;
      keep[t] = -a;
      total += std::min(a, 0.0f) - std::log1p(std::exp(-std::abs(a)));
      cum[t] = total;
    }
    previous[0] = 1.0f;
    for (int64_t t = 0; t < C; t += LANES) {
      store(eta + t, rule.eta_max * sigmoid(load(eta + t)));
      store(keep + t, sigmoid(load(keep + t)));  // the slope of log alpha: 1 - alpha
      store(current + t, exponential(load(cum + t)));
    }
    // decays from token j to after token i, for j <= i; to before token i: the row above; to the end: the last row
    ratio = arena.take((C + 1) * C), after = ratio + C, left = after + (C - 1) * C;
    std::memset(ratio, 0, C * sizeof(float));
    for (int64_t i = 0; i < C; i++)
      for (int64_t j = 0; j < std::min(i + 2, C); j += LANES) {
        const int64_t seen = i - j;  // lanes below the diagonal
        const __mmask16 whole = seen < 0 ? 0 : seen >= LANES - 1 ? 0xffff : (2u << seen) - 1;
        const Vector decay = exponential(cum[i] - load(cum + j));
        _mm512_storeu_ps(after + i * C + j, _mm512_maskz_mov_ps(whole, reinterpret_cast<__m512>(decay)));
      }
    lower = arena.take(C * C);
    a2 = arena.take(C * C), system2 = arena.take(C * C), y2 = arena.take(C * N), u = arena.take(C * N);
    left_k = arena.take(C * N);
    weigh(k, N, a2, nullptr);
    solve(a2, eta, system2);
    each(C, N, [&](int64_t t, int64_t i) { store(left_k + i, left[t] * load(k + i)); });
    upper_times<false>(C, N, system2, left_k, y2);
    each(C, N, [&](int64_t t, int64_t i) { store(u + i, eta[t] * load(y2 + i)); });
  }

  // Targets, gradients and writes of box p; with BACKWARD also what only its backward needs.
  template <bool BACKWARD>
  Box box(int p) {
    Box x;
    for (float** part : {&x.at_k, &x.h, &x.slope, &x.hv, &x.back, &x.b2}) *part = arena.take(C * E);
    if (BACKWARD)
      for (float** part : {&x.bend, &x.slope_v, &x.moved2}) *part = arena.take(C * E);
    x.a = arena.take(C * C), x.rate = arena.take(C), x.squares = arena.take(C);
    multiply<false>(C, E, N, k, N, 1, now.w2_turned[p], x.at_k);
    multiply<false>(C, E, N, v, N, 1, now.w2_turned[p], x.hv);
    each(C, E, [&](int64_t, int64_t i) {
      const Vector at = load(x.at_k + i), gate = sigmoid(at), out = at * gate;
      store(x.h + i, out);
      store(x.slope + i, gate + out * (1.0f - gate));
      const Vector at_v = load(x.hv + i), gate_v = sigmoid(at_v), out_v = at_v * gate_v;
      store(x.hv + i, out_v);
      if (BACKWARD) {
        store(x.bend + i, gate * (1.0f - gate) * (2.0f + at * (1.0f - 2.0f * gate)));
        store(x.slope_v + i, gate_v + out_v * (1.0f - gate_v));
      }
    });
    const float factor = rule.factor;
    if (p < SCALARS) {
      for (float** part : {&x.y, &x.g, &x.b1, &x.r}) *part = arena.take(C);
      const float *w = now.w1s[p], *start = init.w1s[p];
      for (int64_t t = 0; t < C; t++) {
        const float at_h = dot(x.h + t * E, w, E), first = dot(x.h + t * E, start, E);
        x.y[t] = at_h - first;
        x.g[t] = factor * (at_h - dot(x.hv + t * E, w, E));
        x.b1[t] = previous[t] * x.y[t] + first + x.g[t];
        for (int64_t n = 0; n < E; n += LANES) store(x.back + t * E + n, x.g[t] * load(w + n));
      }
    } else {
      const int m = p - SCALARS;
      for (float** part : {&x.y, &x.g, &x.b1, &x.r}) *part = arena.take(C * N);
      float* at_hv = x.r;  // not needed yet
      multiply<false>(C, N, E, x.h, E, 1, now.w1_turned[m], x.y);
      multiply<false>(C, N, E, x.hv, E, 1, now.w1_turned[m], at_hv);
      each(C, N, [&](int64_t, int64_t i) {
        store(x.g + i, factor * ((load(k + i) - load(v + i)) + (load(x.y + i) - load(at_hv + i))));
      });
      multiply<false>(C, E, N, x.g, N, 1, now.w1[m], x.back);
      if (fresh) each(C, N, [&](int64_t, int64_t i) { store(x.b1 + i, load(x.y + i) + load(x.g + i)); });
      else {
        multiply<false>(C, N, E, x.h, E, 1, init.w1_turned[m], x.b1);
        each(C, N, [&](int64_t t, int64_t i) {
          const Vector start = load(x.b1 + i), moved = load(x.y + i) - start;
          store(x.y + i, moved);
          store(x.b1 + i, previous[t] * moved + start + load(x.g + i));
        });
      }
    }
    // b of W2
    if (fresh)
      each(C, E, [&](int64_t, int64_t i) { store(x.b2 + i, load(x.at_k + i) + load(x.back + i) * load(x.slope + i)); });
    else {
      multiply<false>(C, E, N, k, N, 1, init.w2_turned[p], x.b2);
      each(C, E, [&](int64_t t, int64_t i) {
        const Vector start = load(x.b2 + i), moved = load(x.at_k + i) - start;
        if (BACKWARD) store(x.moved2 + i, moved);
        store(x.b2 + i, previous[t] * moved + start + load(x.back + i) * load(x.slope + i));
      });
    }
    // writes of W1
    weigh(x.h, E, x.a, x.squares);
    for (int64_t t = 0; t < C; t++) x.rate[t] = eta[t] / (1.0f + eta[t] * x.squares[t]);
    if (p < SCALARS) {
      for (int64_t t = 0; t < C; t++) x.r[t] = x.rate[t] * x.b1[t];
      substitute(C, x.a, x.rate, x.r);
      return x;
    }
    x.system = arena.take(C * C);
    solve(x.a, x.rate, x.system);
    float* scaled = turned;
    each(C, N, [&](int64_t t, int64_t i) { store(scaled + i, x.rate[t] * load(x.b1 + i)); });
    lower_times<false>(C, N, x.system, scaled, x.r);
    return x;
  }

  // The box after the chunk, clamped; gives the factors of its two clamps.
  void commit(int p, const Box& x, const Changes& to, const float* init_norms, float* factors) {
    const float kept = current[C - 1];
    float* w2 = to.w2 + p * E * N;
    multiply<false>(E, N, C, x.b2, 1, E, u, w2);
    factors[p] = settle(w2, now.w2 + p * E * N, init.w2 + p * E * N, E * N, kept, init_norms[p]);
    float* left_h = turned;
    each(C, E, [&](int64_t t, int64_t i) { store(left_h + i, left[t] * load(x.h + i)); });
    if (p < SCALARS) {
      multiply<false>(1, E, C, x.r, 1, 1, left_h, to.w1s[p]);
      factors[BOXES + p] = settle(to.w1s[p], now.w1s[p], init.w1s[p], E, kept, init_norms[BOXES + p]);
    } else {
      const int m = p - SCALARS;
      multiply<false>(N, E, C, x.r, 1, N, left_h, to.w1[m]);
      factors[BOXES + p] = settle(to.w1[m], now.w1[m], init.w1[m], E * N, kept, init_norms[BOXES + p]);
    }
  }

  // The main memory's answers up to its hidden layer: q, what W2 wrote, scores, what it is asked (with BACKWARD it is
  // given, else written there), and silu of that with its slope.
  template <bool BACKWARD>
  void ask(const Box& x, const float* q_from, int64_t q_row, std::conditional_t<BACKWARD, const float*, float*> asked) {
    q = arena.take(C * N), q_norm = arena.take(C), r2 = arena.take(C * E);
    q_raw = arena.take(C * N);
    for (int64_t t = 0; t < C; t++) std::memcpy(q_raw + t * N, q_from + t * q_row, N * sizeof(float));
    if (rule.normalize_q) normalise(q_raw, q, q_norm);
    else std::memcpy(q, q_raw, C * N * sizeof(float));
    float* scaled = turned;
    each(C, E, [&](int64_t t, int64_t i) { store(scaled + i, eta[t] * load(x.b2 + i)); });
    lower_times<false>(C, E, system2, scaled, r2);
    score2 = arena.take(C * C), score1 = arena.take(C * C), hidden = arena.take(C * E), hidden_slope = arena.take(C * E);
    score(q, k, N, score2);
    if constexpr (!BACKWARD) {
      float *start = arena.take(C * E), *written = arena.take(C * E);
      multiply<false>(C, E, N, q, N, 1, now.w2_turned[MEM], asked);
      if (!fresh) multiply<false>(C, E, N, q, N, 1, init.w2_turned[MEM], start);
      lower_times<false>(C, E, score2, r2, written);
      each(C, E, [&](int64_t t, int64_t i) { store(asked + i, decayed(t, asked + i, start + i) - load(written + i)); });
    }
    activate(asked, hidden, hidden_slope);
    score(hidden, x.h, E, score1);
  }

  void answer(const Box& x, float* out) {
    float *start = arena.take(C * N), *written = arena.take(C * N);
    multiply<false>(C, N, E, hidden, E, 1, now.w1_turned[2], out);
    if (!fresh) multiply<false>(C, N, E, hidden, E, 1, init.w1_turned[2], start);
    lower_times<false>(C, N, score1, x.r, written);
    each(C, N, [&](int64_t t, int64_t i) {
      store(out + i, load(q + i) + decayed(t, out + i, start + i) - load(written + i));
    });
  }

  // Backward, in this order.
  void begin_backward(const Changes& weights, const Changes& initial);
  void answer_backward(const Box& x, const float* d_out, float* d_q_to);
  void box_backward(int p, const Box& x, const Weights& after_chunk, const Weights& d_after, const float* factors,
                    const float* init_norms);
  void end_backward(float* d_z);

 private:
  const Rule& rule;
  const int64_t C, N, E;
  const Weights &now, &init;
  const bool fresh;
  Arena& arena;
  Changes given, shared;
  float *turned, *lower, *z, *z_h[MEM], *z_slope[MEM], *k, *v, *k_norm, *v_norm;
  float *eta, *keep, *cum, *previous, *current, *left, *ratio, *after, *a2, *system2, *y2, *u, *left_k;
  float *q, *q_raw, *q_norm, *r2, *score1, *score2, *hidden, *hidden_slope;
  float *d_k, *d_v, *d_u, *d_eta, *d_previous, *d_current, *d_left, *d_cum, *d_before, *outer2, *d_r2, *d_r1, *d_h;

  // After token t: what now's product has become, on its way to init's.
  Vector decayed(int64_t t, const float* from_now, const float* from_init) const {
    const Vector value = load(from_now);
    if (fresh) return value;
    const Vector first = load(from_init);
    return current[t] * (value - first) + first;
  }

  // silu and its slope of x; `slope` may be x itself.
  void activate(const float* x, float* value, float* slope) {
    each(C, E, [&](int64_t, int64_t i) {
      const Vector at = load(x + i), gate = sigmoid(at), out = at * gate;
      store(value + i, out);
      store(slope + i, gate + out * (1.0f - gate));
    });
  }

  void normalise(const float* x, float* out, float* inverse) {
    for (int64_t t = 0; t < C; t++) {
      inverse[t] = 1.0f / std::sqrt(dot(x + t * N, x + t * N, N) + 1e-12f);
      for (int64_t n = 0; n < N; n += LANES) store(out + t * N + n, inverse[t] * load(x + t * N + n));
    }
  }

  // a_ij = ratio_ij (x_i . x_j), and |x_i|^2 where it is wanted
  void weigh(const float* x, int64_t width, float* a, float* squares) {
    pairs<false>(C, width, x, x, turned, a);
    if (squares)
      for (int64_t i = 0; i < C; i++) squares[i] = a[i * C + i];
    for (int64_t i = 0; i < C; i++)
      for (int64_t j = 0; j <= i; j += LANES) store(a + i * C + j, load(a + i * C + j) * load(ratio + i * C + j));
  }

  void score(const float* queries, const float* keys, int64_t width, float* out) {
    pairs<false>(C, width, queries, keys, turned, out);
    for (int64_t i = 0; i < C; i++)
      for (int64_t j = 0; j <= i; j += LANES) store(out + i * C + j, load(out + i * C + j) * load(after + i * C + j));
  }

  void solve(const float* a, const float* rate, float* system) {
    for (int64_t i = 0; i < C; i++)
      for (int64_t j = 0; j <= i; j += LANES) store(lower + i * C + j, rate[i] * load(a + i * C + j));
    invert(C, lower, system);
  }

  // new = kept (now - init) + init - new, then held to the clamp; gives the factor.
  float settle(float* to, const float* from, const float* start, int64_t size, float kept, float init_norm) {
    Vector squares{};
    for (int64_t i = 0; i < size; i += LANES) {
      const Vector first = load(start + i), value = kept * (load(from + i) - first) + first - load(to + i);
      squares += value * value;
      store(to + i, value);
    }
    const float limit = rule.clamp * init_norm, total = sum(squares);
    if (!(total > limit * limit)) return 1.0f;
    const float factor = limit / std::sqrt(total);
    for (int64_t i = 0; i < size; i += LANES) store(to + i, factor * load(to + i));
    return factor;
  }

  // For the backward.
  float* zeros(int64_t floats);
  void normalise_backward(const float* out, const float* inverse, const float* d_out, float* d_x);
  void unsettle(const float* d_clamped, const float* clamped, const float* from, const float* start, int64_t size,
                float kept, float factor, float init_norm, bool more, float* minus_d_new, float* d_now, float* d_init);
  void read_backward(int64_t rows, int64_t width, const float* d, const float* x, const float* from_now, const float* from_init,
                     float* d_now, float* d_init, float* d_x, float* minus);
  void score_backward(int64_t width, const float* d, const float* r, const float* scores, float* d_r, float* d_pairs);
  void pairs_backward(const float* a, const float* rate, float* d_rate);
  void scalar_backward(int p, const Box& x, const Weights& after_chunk, const Weights& d_after, const float* factors,
                       const float* init_norms, const float* d_back, float* d_hidden, float* d_hidden_v, float* d_rate);
};

}  // namespace hope
