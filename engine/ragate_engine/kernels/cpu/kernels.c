/* The CPU kernels: every operation of the decoder in float32, with the same bits for any batch, chunk or thread count.
 *
 * Each output element is made by one fixed sequence of fused multiply-adds that depends on its own row alone, and
 * vectors are sixteen floats wide whatever the machine has: so AVX2 and AVX-512 (and any CPU with FMA) agree to the
 * bit. Build with -ffp-contract=fast and without -ffast-math. No dependency but pthreads.
 */
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16  /* columns of a weight panel, tokens of a KV block */
#ifdef __AVX512F__
#define WIDTH 16  /* floats of a hardware vector */
#define ROWS 12   /* rows of a register tile */
#else
#define WIDTH 8
#define ROWS 3
#endif
#define PARTS (LANES / WIDTH)
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(WIDTH * 4), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(WIDTH * 4), aligned(4)));

/* ---- threads: a pool that runs `task(context, i)` for i in [0, count) ---- */

typedef void (*task_fn)(const void *context, long i);
static struct {
  pthread_mutex_t lock, owner;
  pthread_cond_t wake;
  int size, started;
  atomic_long generation, next, pending, count;
  task_fn task;
  const void *context;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .owner = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .size = 1};

/* One turn of a waiting loop: a short pause at first, then the core is given to whoever needs it. */
static void wait_turn(int *spins) {
  if (++*spins > 500) sched_yield();
#if defined(__x86_64__)
  else __builtin_ia32_pause();
#endif
}

static void run_tasks(void) {
  long i;
  while ((i = atomic_fetch_add(&pool.next, 1)) < atomic_load(&pool.count)) {
    pool.task(pool.context, i);
  }
}

static void *worker(void *start) {
  long seen = (long)(intptr_t)start;
  for (;;) {
    int spins = 0;
    while (atomic_load_explicit(&pool.generation, memory_order_acquire) == seen) {
      if (spins < 600) wait_turn(&spins);
      else {
        pthread_mutex_lock(&pool.lock);
        while (atomic_load(&pool.generation) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
        pthread_mutex_unlock(&pool.lock);
      }
    }
    seen = atomic_load(&pool.generation);
    run_tasks();
    atomic_fetch_sub(&pool.pending, 1);
  }
  return NULL;
}

/* After fork the child has none of the threads: it starts over with one. */
static void after_fork(void) {
  pthread_mutex_init(&pool.lock, NULL);
  pthread_mutex_init(&pool.owner, NULL);
  pthread_cond_init(&pool.wake, NULL);
  pool.size = 1;
  pool.started = 0;
}

/* Set how many threads work, the caller's included. Threads already started stay. */
void rg_set_threads(int n) {
  static int registered;
  pthread_mutex_lock(&pool.owner);
  if (!registered) registered = !pthread_atfork(NULL, NULL, after_fork);
  while (pool.started < n - 1) {
    pthread_t thread;
    void *start = (void *)(intptr_t)atomic_load(&pool.generation); /* it joins with the next operation */
    if (pthread_create(&thread, NULL, worker, start)) break;
    pthread_detach(thread);
    pool.started++;
  }
  pool.size = n;
  pthread_mutex_unlock(&pool.owner);
}

static void parallel(task_fn task, const void *context, long count) {
  if (pool.size == 1 || count < 2) {
    for (long i = 0; i < count; i++) task(context, i);
    return;
  }
  pthread_mutex_lock(&pool.owner); /* one operation at a time: two engines may share the pool */
  pool.task = task;
  pool.context = context;
  atomic_store(&pool.count, count);
  atomic_store(&pool.next, 0);
  atomic_store(&pool.pending, pool.started);
  pthread_mutex_lock(&pool.lock);
  atomic_fetch_add_explicit(&pool.generation, 1, memory_order_release);
  pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.lock);
  run_tasks();
  for (int spins = 0; atomic_load(&pool.pending);) wait_turn(&spins);
  pthread_mutex_unlock(&pool.owner);
}

/* ---- arithmetic ---- */

INLINE vec splat(float x) { return x - (vec){0}; }
INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec x) { *(vec *)p = x; }

/* Sum of sixteen lanes, by halves. */
INLINE float lane_sum(const float *x) {
  float a[8], b[4];
  for (int i = 0; i < 8; i++) a[i] = x[i] + x[i + 8];
  for (int i = 0; i < 4; i++) b[i] = a[i] + a[i + 4];
  return (b[0] + b[2]) + (b[1] + b[3]);
}

/* exp(x) for x <= 88, 0 below -87: Cephes' expf, range reduction and a polynomial of degree 5 (relative error 1e-7). */
INLINE vec exp_vec(vec x) {
  const vec shift = splat(12582912.f); /* 1.5 * 2^23: adding it rounds to the nearest integer */
  ivec under = x < splat(-87.f);
  x = (vec)(((ivec)x & ~under) | ((ivec)splat(-87.f) & under));
  vec n = x * splat(1.44269504088896341f) + shift;
  n = n - shift;
  vec r = x - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  vec s = r * r;
  p = p * s + r;
  p = p + splat(1.f);
  ivec e = (__builtin_convertvector(n, ivec) + 127) << 23;
  vec y = p * (vec)e;
  return (vec)((ivec)y & ~under);
}

/* ---- linear: y[m, n] = sum_k x[m, k] w[n, k] + bias[n] ---- */

/* C[rows, LANES * panels] = A[rows, K] B, where panel j of B is [K][LANES] at B + j * panel. Each sum runs over k upward. */
INLINE void tile(const float *A, long lda, const float *B, long panel, long ldb, long K, float *C, long ldc, int rows,
                 int panels, int accumulate) {
  vec acc[ROWS][2][PARTS];
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < panels; j++)
      for (int h = 0; h < PARTS; h++) acc[i][j][h] = accumulate ? load(C + i * ldc + j * LANES + h * WIDTH) : splat(0);
  for (long k = 0; k < K; k++) {
    vec b[2][PARTS];
    for (int j = 0; j < panels; j++)
      for (int h = 0; h < PARTS; h++) b[j][h] = load(B + j * panel + k * ldb + h * WIDTH);
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
      vec a = splat(A[i * lda + k]);
      for (int j = 0; j < panels; j++)
        for (int h = 0; h < PARTS; h++) acc[i][j][h] += a * b[j][h];
    }
  }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < panels; j++)
      for (int h = 0; h < PARTS; h++) store(C + i * ldc + j * LANES + h * WIDTH, acc[i][j][h]);
}

#define TILE_CASE(n) case n: tile(A, lda, B, panel, ldb, K, C, ldc, n, panels, accumulate); break;
INLINE void tile_rows(const float *A, long lda, const float *B, long panel, long ldb, long K, float *C, long ldc, int rows,
                      int panels, int accumulate) {
  switch (rows) {
    TILE_CASE(1) TILE_CASE(2) TILE_CASE(3)
#if ROWS > 3
    TILE_CASE(4) TILE_CASE(5) TILE_CASE(6) TILE_CASE(7) TILE_CASE(8) TILE_CASE(9) TILE_CASE(10) TILE_CASE(11) TILE_CASE(12)
#endif
  }
}

typedef struct { const float *x, *w, *bias; float *y; long M, K, N, panels, per_task, row_block; } linear_args;

static void linear_task(const void *context, long t) {
  const linear_args *a = context;
  long tasks = (a->panels + a->per_task - 1) / a->per_task;
  long r0 = t / tasks * a->row_block, r1 = r0 + a->row_block < a->M ? r0 + a->row_block : a->M;
  long p0 = t % tasks * a->per_task, p1 = p0 + a->per_task < a->panels ? p0 + a->per_task : a->panels;
  float out[ROWS][2 * LANES];
  for (long p = p0; p < p1; p += 2) {
    int wide = p + 1 < p1 ? 2 : 1;
    long columns = a->N - p * LANES < wide * LANES ? a->N - p * LANES : wide * LANES;
    const float *B = a->w + p * a->K * LANES;
    for (long i = r0; i < r1; i += ROWS) {
      int rows = r1 - i < ROWS ? (int)(r1 - i) : ROWS;
      const float *A = a->x + i * a->K;
      if (wide == 2) tile_rows(A, a->K, B, a->K * LANES, LANES, a->K, out[0], 2 * LANES, rows, 2, 0);
      else tile_rows(A, a->K, B, a->K * LANES, LANES, a->K, out[0], 2 * LANES, rows, 1, 0);
      for (int r = 0; r < rows; r++) {
        float *y = a->y + (i + r) * a->N + p * LANES;
        if (a->bias) for (long c = 0; c < columns; c++) y[c] = out[r][c] + a->bias[p * LANES + c];
        else memcpy(y, out[r], columns * sizeof(float));
      }
    }
  }
}

/* x [M, K]; w packed as [ceil(N/16)][K][16], zero padded; bias [N] or NULL; y [M, N]. */
void rg_linear(const float *x, const float *w, const float *bias, float *y, long M, long K, long N) {
  linear_args a = {x, w, bias, y, M, K, N, (N + LANES - 1) / LANES, 0, 96};
  if (M == 0) return;
  long row_blocks = (M + a.row_block - 1) / a.row_block;
  long per = a.panels / (4 * pool.size / row_blocks + 1);
  a.per_task = per < 2 ? 2 : (per + 1) / 2 * 2;
  parallel(linear_task, &a, row_blocks * ((a.panels + a.per_task - 1) / a.per_task));
}

/* ---- norm ---- */

typedef struct { float *h; const float *x, *w; float *y; long D; float eps; } norm_args;

INLINE float rms_scale(const float *x, long D, float eps) {
  float lanes[LANES] = {0};
  vec acc[PARTS];
  for (int h = 0; h < PARTS; h++) acc[h] = splat(0);
  long d = 0;
  for (; d + LANES <= D; d += LANES)
    for (int h = 0; h < PARTS; h++) { vec v = load(x + d + h * WIDTH); acc[h] += v * v; }
  for (int h = 0; h < PARTS; h++) store(lanes + h * WIDTH, acc[h]);
  for (int i = 0; d < D; d++, i++) lanes[i] = __builtin_fmaf(x[d], x[d], lanes[i]);
  float mean = lane_sum(lanes) / (float)D;
  return 1.f / sqrtf(mean + eps);
}

static void norm_task(const void *context, long m) {
  const norm_args *a = context;
  float *h = a->h + m * a->D;
  if (a->x) for (long d = 0; d < a->D; d++) h[d] += a->x[m * a->D + d];
  float s = rms_scale(h, a->D, a->eps);
  for (long d = 0; d < a->D; d++) { float v = h[d] * s; a->y[m * a->D + d] = v * a->w[d]; }
}

/* h [M, D] += x [M, D] unless x is NULL; y = h / rms(h) * w. */
void rg_rms_norm(float *h, const float *x, const float *w, float *y, long M, long D, float eps) {
  norm_args a = {h, x, w, y, D, eps};
  parallel(norm_task, &a, M);
}

/* ---- rope and KV write ---- */

typedef struct {
  float *qkv; const float *q_norm, *k_norm, *cos, *sin; const int32_t *positions, *slots;
  float *k_cache, *v_cache; long H, KVH, D, R; float eps;
} rope_args;

INLINE void turn(float *x, const float *norm, const float *c, const float *s, const rope_args *a) {
  if (norm) {
    float scale = rms_scale(x, a->D, a->eps);
    for (long d = 0; d < a->D; d++) { float v = x[d] * scale; x[d] = v * norm[d]; }
  }
  long half = a->R / 2;
  for (long d = 0; d < half; d++) {
    float p = x[d], q = x[d + half], ps = p * s[d], qs = q * s[d];
    x[d] = __builtin_fmaf(p, c[d], -qs);
    x[d + half] = __builtin_fmaf(q, c[d], ps);
  }
}

static void rope_task(const void *context, long m) {
  const rope_args *a = context;
  long D = a->D, half = a->R / 2;
  float *row = a->qkv + m * (a->H + 2 * a->KVH) * D;
  const float *c = a->cos + a->positions[m] * half, *s = a->sin + a->positions[m] * half;
  for (long h = 0; h < a->H; h++) turn(row + h * D, a->q_norm, c, s, a);
  long block = a->slots[m] / LANES, at = a->slots[m] % LANES;
  for (long h = 0; h < a->KVH; h++) {
    float *k = row + (a->H + h) * D, *v = k + a->KVH * D;
    turn(k, a->k_norm, c, s, a);
    float *kc = a->k_cache + (block * a->KVH + h) * D * LANES + at;
    for (long d = 0; d < D; d++) kc[d * LANES] = k[d];
    memcpy(a->v_cache + ((block * a->KVH + h) * LANES + at) * D, v, D * sizeof(float));
  }
}

/* qkv [M, (H + 2 KVH) D]: norm (unless NULL) and turn q and k in place by cos/sin [positions, R/2], write k and v to
 * their slots. Caches: k [blocks][KVH][D][16], v [blocks][KVH][16][D]. */
void rg_rope_write_kv(float *qkv, const float *q_norm, const float *k_norm, const float *cos, const float *sin,
                      const int32_t *positions, const int32_t *slots, float *k_cache, float *v_cache, long M, long H,
                      long KVH, long D, long R, float eps) {
  rope_args a = {qkv, q_norm, k_norm, cos, sin, positions, slots, k_cache, v_cache, H, KVH, D, R, eps};
  parallel(rope_task, &a, M);
}

/* ---- paged attention ---- */

typedef struct {
  const float *qkv, *k_cache, *v_cache; float *out; const int32_t *positions, *row_table, *tables, *groups;
  long table_width, H, KVH, D, window; float scale, cap;
} attention_args;

/* This thread's own buffer of at least `bytes`; it grows and is kept. */
static float *scratch(size_t bytes) {
  static __thread float *buffer;
  static __thread size_t size;
  if (bytes > size) {
    free(buffer);
    size = bytes + bytes / 2;
    buffer = malloc(size);
  }
  return buffer;
}

/* One group of rows, one KV head. A group is (first row, rows, shared): its rows' first `shared` blocks are the same
 * physical blocks and full for every row, so each is read once for all; every row then goes on with its own. Scores of a row are laid
 * out by absolute position, so neither the grouping nor the chunk a row came in changes its bits. */
static void attention_task(const void *context, long t) {
  const attention_args *a = context;
  long D = a->D, G = a->H / a->KVH, kvh = t % a->KVH;
  const int32_t *group = a->groups + t / a->KVH * 3;
  long row0 = group[0], rows = group[1], shared = group[2], stride = (a->H + 2 * a->KVH) * D;
  long longest = 0;
  for (long r = 0; r < rows; r++) if (a->positions[row0 + r] + 1 > longest) longest = a->positions[row0 + r] + 1;
  long padded = (longest + LANES - 1) / LANES * LANES, lines = rows * G;
  long first = a->window ? a->positions[row0] - a->window + 1 : 0; /* oldest position that any row sees */
  for (long r = 1; a->window && r < rows; r++) {
    long f = a->positions[row0 + r] - a->window + 1;
    if (f < first) first = f;
  }
  long block0 = first > 0 ? first / LANES : 0;
  float *q = scratch((lines * D + lines * D + lines * padded) * sizeof(float));
  float *acc = q + lines * D, *scores = acc + lines * D;
  for (long r = 0; r < rows; r++)
    for (long g = 0; g < G; g++) {
      const float *from = a->qkv + (row0 + r) * stride + (kvh * G + g) * D;
      for (long d = 0; d < D; d++) q[(r * G + g) * D + d] = from[d] * a->scale;
    }
  memset(acc, 0, lines * D * sizeof(float));
  for (int pass = 0; pass < 2; pass++) {
    for (long r = -1; r < rows; r++) { /* r = -1: the shared blocks, for all rows at once */
      long b0 = r < 0 ? block0 : shared, b1 = r < 0 ? shared : a->positions[row0 + r] / LANES + 1;
      if (b0 < block0) b0 = block0;
      long line0 = r < 0 ? 0 : r * G, line1 = r < 0 ? lines : line0 + G;
      const int32_t *table = a->tables + a->row_table[row0 + (r < 0 ? 0 : r)] * a->table_width;
      for (long b = b0; b < b1; b++) {
        const float *k = a->k_cache + (table[b] * a->KVH + kvh) * D * LANES;
        const float *v = a->v_cache + (table[b] * a->KVH + kvh) * LANES * D;
        for (long i = line0; i < line1; i += ROWS) {
          int n = line1 - i < ROWS ? (int)(line1 - i) : ROWS;
          if (pass == 0) tile_rows(q + i * D, D, k, 0, LANES, D, scores + i * padded + b * LANES, padded, n, 1, 0);
          else {
            long left = r < 0 ? LANES : a->positions[row0 + r] + 1 - b * LANES; /* slots beyond may hold anything */
            long tokens = left < LANES ? left : LANES;
            for (long d = 0; d < D; d += LANES)
              tile_rows(scores + i * padded + b * LANES, padded, v + d, 0, D, tokens, acc + i * D + d, D, n, 1, 1);
          }
        }
      }
    }
    if (pass == 1) break;
    for (long i = 0; i < lines; i++) { /* softmax over each row's own positions; the rest of its last block gets 0 */
      float *s = scores + i * padded;
      long position = a->positions[row0 + i / G], end = (position / LANES + 1) * LANES;
      long begin = a->window && position - a->window + 1 > 0 ? position - a->window + 1 : 0;
      if (a->cap > 0) for (long j = begin; j <= position; j++) s[j] = a->cap * tanhf(s[j] / a->cap);
      float top = s[begin], sum[LANES] = {0};
      for (long j = begin; j <= position; j++) top = s[j] > top ? s[j] : top;
      for (long j = block0 * LANES; j < begin; j++) s[j] = -INFINITY;
      for (long j = position + 1; j < end; j++) s[j] = -INFINITY;
      vec total[PARTS];
      for (int h = 0; h < PARTS; h++) total[h] = splat(0);
      for (long j = begin / LANES * LANES; j < end; j += LANES)
        for (int h = 0; h < PARTS; h++) {
          vec p = exp_vec(load(s + j + h * WIDTH) - splat(top));
          store(s + j + h * WIDTH, p);
          total[h] += p;
        }
      for (long j = block0 * LANES; j < begin / LANES * LANES; j++) s[j] = 0;
      for (int h = 0; h < PARTS; h++) store(sum + h * WIDTH, total[h]);
      q[i * D] = lane_sum(sum);
    }
  }
  for (long i = 0; i < lines; i++) {
    float *to = a->out + (row0 + i / G) * a->H * D + (kvh * G + i % G) * D, l = q[i * D];
    for (long d = 0; d < D; d++) to[d] = acc[i * D + d] / l;
  }
}

/* qkv [M, (H + 2 KVH) D] after rope; out [M, H D]; positions [M]; row_table [M] indexes tables [requests, table_width];
 * groups [n_groups, 3] as above. window 0: none; cap 0: no soft cap. D a multiple of 16. */
void rg_attention(const float *qkv, const float *k_cache, const float *v_cache, float *out, const int32_t *positions,
                  const int32_t *row_table, const int32_t *tables, const int32_t *groups, long n_groups, long table_width,
                  long H, long KVH, long D, long window, float scale, float cap) {
  attention_args a = {qkv, k_cache, v_cache, out, positions, row_table, tables, groups, table_width, H, KVH, D, window, scale, cap};
  parallel(attention_task, &a, n_groups * KVH);
}

/* ---- gated activation ---- */

typedef struct { const float *x; float *y; long F; int gelu; } act_args;

static void act_task(const void *context, long m) {
  const act_args *a = context;
  const float *g = a->x + m * 2 * a->F, *u = g + a->F;
  float *y = a->y + m * a->F;
  for (long f = 0; f < a->F; f += WIDTH) {
    vec v, w, r;
    if (f + WIDTH <= a->F) { v = load(g + f); w = load(u + f); }
    else {
      float t[2 * WIDTH] = {0};
      memcpy(t, g + f, (a->F - f) * 4); memcpy(t + WIDTH, u + f, (a->F - f) * 4);
      v = load(t); w = load(t + WIDTH);
    }
    vec z = v; /* silu(v) = v / (1 + exp(-v)); gelu_tanh(v) = v / (1 + exp(-2 c (v + 0.044715 v^3))), c = sqrt(2/pi) */
    if (a->gelu) { vec cube = v * v * v; z = (v + splat(0.044715f) * cube) * splat(1.5957691216057308f); }
    ivec low = z < splat(-87.f);
    z = (vec)(((ivec)z & ~low) | ((ivec)splat(-87.f) & low));
    r = v / (splat(1.f) + exp_vec(-z)) * w;
    if (f + WIDTH <= a->F) store(y + f, r);
    else { float t[WIDTH]; store(t, r); memcpy(y + f, t, (a->F - f) * 4); }
  }
}

/* x [M, 2 F] is gate | up; y [M, F] = act(gate) * up. */
void rg_act_mul(const float *x, float *y, long M, long F, int gelu) {
  act_args a = {x, y, F, gelu};
  parallel(act_task, &a, M);
}

/* ---- pick: the likeliest allowed token ---- */

typedef struct { const float *x; const int32_t *mask; long V, words; int32_t *id; float *lse; } pick_args;

static void pick_task(const void *context, long m) {
  const pick_args *a = context;
  const float *x = a->x + m * a->V;
  const int32_t *mask = a->mask + m * a->words;
  float top = x[0], best = -INFINITY;
  long at = -1;
  for (long i = 0; i < a->V; i++) top = x[i] > top ? x[i] : top;
  for (long w = 0; w < a->words; w++) {
    uint32_t bits = (uint32_t)mask[w];
    while (bits) {
      long i = w * 32 + __builtin_ctz(bits);
      bits &= bits - 1;
      if (i < a->V && x[i] > best) { best = x[i]; at = i; }
    }
  }
  vec total[PARTS];
  float lanes[LANES];
  for (int h = 0; h < PARTS; h++) total[h] = splat(0);
  long i = 0;
  for (; i + LANES <= a->V; i += LANES)
    for (int h = 0; h < PARTS; h++) total[h] += exp_vec(load(x + i + h * WIDTH) - splat(top));
  for (int h = 0; h < PARTS; h++) store(lanes + h * WIDTH, total[h]);
  float tail[LANES];
  for (long j = 0; j < LANES; j++) tail[j] = i + j < a->V ? x[i + j] - top : -100.f;
  for (int h = 0; h < PARTS; h++) store(lanes + h * WIDTH, load(lanes + h * WIDTH) + exp_vec(load(tail + h * WIDTH)));
  a->id[m] = (int32_t)at;
  a->lse[m] = top + (float)log((double)lane_sum(lanes));
}

/* The `count` likeliest allowed tokens of each row, best first, the lowest id among equals; ids are -1 where fewer are
 * allowed. values are their logits. */
typedef struct { const float *x; const int32_t *mask; long V, words, count; int32_t *ids; float *values; } top_args;

static void top_task(const void *context, long m) {
  const top_args *a = context;
  const float *x = a->x + m * a->V;
  const int32_t *mask = a->mask + m * a->words;
  int32_t *ids = a->ids + m * a->count;
  float *values = a->values + m * a->count;
  for (long j = 0; j < a->count; j++) { ids[j] = -1; values[j] = -INFINITY; }
  for (long w = 0; w < a->words; w++) {
    uint32_t bits = (uint32_t)mask[w];
    while (bits) {
      long i = w * 32 + __builtin_ctz(bits), j = a->count - 1;
      bits &= bits - 1;
      if (i >= a->V || !(x[i] > values[j])) continue;
      for (; j > 0 && x[i] > values[j - 1]; j--) { ids[j] = ids[j - 1]; values[j] = values[j - 1]; }
      ids[j] = (int32_t)i;
      values[j] = x[i];
    }
  }
}

/* logits [M, V], mask [M, words]: ids and values [M, count]. */
void rg_likeliest(const float *logits, const int32_t *mask, int32_t *ids, float *values, long M, long V, long words, long count) {
  top_args a = {logits, mask, V, words, count, ids, values};
  parallel(top_task, &a, M);
}

/* logits [M, V], mask [M, words] (bit i of word w allows token 32 w + i): id [M] the likeliest allowed token, the lowest
 * id among equals, -1 where none is allowed; lse [M] log-sum-exp over all tokens. */
void rg_pick(const float *logits, const int32_t *mask, int32_t *id, float *lse, long M, long V, long words) {
  pick_args a = {logits, mask, V, words, id, lse};
  parallel(pick_task, &a, M);
}
