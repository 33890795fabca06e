// One lane: the level of a machine that we know nothing about. Included inside a namespace, once per level, by
// every_level.h; the three vec_*.h offer the same functions.
using V = float;
constexpr int W = 1;              // lanes
constexpr int ACCUMULATORS = 4;   // vector registers that a block of sums may take

static inline V splat(float x) { return x; }
static inline V fma(V a, V b, V c) { return a * b + c; }
static inline V maximum(V a, V b) { return a > b ? a : b; }
static inline float sum(V x) { return x; }
static inline float largest(V x) { return x; }
static inline V exp(V x) { return std::exp(x); }
static inline V expand(u32 mask, V packed) { return mask & 1 ? packed : 0.0f; }  // the next lanes to those with a bit
template <class T>
static inline V load(const T* p) { return to_float(*p); }
template <class T>
static inline V load(const T* p, i64 n) { return n > 0 ? to_float(*p) : 0.0f; }
static inline V load_even(const bf16* p) { return to_float(p[0]); }  // of 2 W neighbours those at even places
static inline V load_odd(const bf16* p) { return to_float(p[1]); }
template <class T>
static inline void store(T* p, V x) { cast(x, p); }
template <class T>
static inline void store(T* p, V x, i64 n) { if (n > 0) cast(x, p); }
static inline void transpose(V*) {}
