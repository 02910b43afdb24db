/* The passes of a step over the measured coordinates, in float32 on the host: see compiled.py.

   A block of 256 coordinates at a time goes through all of a pass while it is in the first cache: one row where all
   coordinates are measured, 32 units of 8 where some are drawn. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 256
#define UNIT 8
#define LANES 8
#define AHEAD 24 /* units that are asked of memory before they are needed */

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define PASS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PASS
#endif
#define INLINE static inline __attribute__((always_inline))

/* Of one parameter: its rows in a vector, its coordinates, and its drawn units; NULL: all of them. */
typedef struct {
    int64_t first, rows, size;
    const int64_t *units;
} Piece;

/* n coordinates from a row on; those that lie scattered, or end within a row, are brought to `room`. NULL: zeros. */
INLINE const float *fetch(const Piece *piece, const float *source, int64_t row, int64_t n, int64_t width, float *room) {
    int64_t start = row * width, left = piece->size - start;
    if (source && !piece->units && left >= n)
        return source + start;
    memset(room, 0, BLOCK * sizeof(float));
    if (!source)
        return room;
    if (!piece->units) {
        memcpy(room, source + start, left * sizeof(float));
        return room;
    }
    int64_t whole = piece->size / UNIT, rest = piece->size % UNIT, drawn = piece->rows - (rest > 0);
    for (int64_t k = 0; k < n / UNIT; k++) {
        int64_t at = row + k;
        if (at + AHEAD < drawn)
            __builtin_prefetch(source + UNIT * piece->units[at + AHEAD]);
        if (at < drawn)
            memcpy(room + UNIT * k, source + UNIT * piece->units[at], UNIT * sizeof(float));
        else
            memcpy(room + UNIT * k, source + UNIT * whole, rest * sizeof(float));
    }
    return room;
}

/* out <- the sums of rows, in pairs. Writes over p. */
INLINE void sums(float *p, int64_t n, int64_t width, float *out) {
    if (width == BLOCK) {
        for (int half = BLOCK / 2; half > 0; half /= 2)
            for (int i = 0; i < half; i++)
                p[i] += p[i + half];
        out[0] = p[0];
        return;
    }
    for (int64_t j = 0; j < n / UNIT; j++) {
        const float *q = p + UNIT * j;
        out[j] = ((q[0] + q[4]) + (q[2] + q[6])) + ((q[1] + q[5]) + (q[3] + q[7]));
    }
}

INLINE void dot(const float *a, const float *b, int64_t n, int64_t width, float scale, float *out) {
    float p[BLOCK];
    for (int64_t i = 0; i < n; i++)
        p[i] = (a[i] * scale) * b[i];
    sums(p, n, width, out);
}

INLINE double sum_of(const double *p) { return ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7])); }

#define EACH_BLOCK                                                                                                     \
    for (int64_t i = 0; i < count; i++)                                                                                \
        for (int64_t row = 0; row < pieces[i].rows; row += BLOCK / width)

#define ITS_PLACE                                                                                                      \
    int64_t left = pieces[i].rows - row, n = (left < BLOCK / width ? left : BLOCK / width) * width,                    \
            line = pieces[i].first + row, at = line * width;

/* into <- the measured coordinates of `sources`. */
PASS void gather(const Piece *pieces, int64_t count, int64_t width, const float *const *sources, float *into) {
    float room[BLOCK];
    EACH_BLOCK {
        ITS_PLACE
        memcpy(into + at, fetch(pieces + i, sources[i], row, n, width, room), n * sizeof(float));
    }
}

/* Whether they are bit by bit what `known` holds. */
PASS int holds(const Piece *pieces, int64_t count, int64_t width, const float *const *sources, const float *known) {
    float room[BLOCK];
    EACH_BLOCK {
        ITS_PLACE
        if (memcmp(known + at, fetch(pieces + i, sources[i], row, n, width, room), n * sizeof(float)))
            return 0;
    }
    return 1;
}

/* out[k] <- scale * sum of a[k] b[k] of each row, of several pairs. */
PASS void dots(int64_t rows, int64_t width, int64_t pairs, const float *const *a, const float *const *b, float scale,
               float *const *out) {
    for (int64_t row = 0; row < rows; row += BLOCK / width) {
        int64_t left = rows - row, n = (left < BLOCK / width ? left : BLOCK / width) * width;
        for (int64_t k = 0; k < pairs; k++)
            dot(a[k] + row * width, b[k] + row * width, n, width, scale, out[k] + row);
    }
}

/* sum <- sum + factor row, n numbers. */
typedef struct {
    double *sum;
    const float *row;
    int64_t n;
    double factor;
} Term;

PASS void add(int64_t count, const Term *terms) {
    for (const Term *t = terms; t < terms + count; t++)
        for (int64_t i = 0; i < t->n; i++)
            t->sum[i] += t->factor * t->row[i];
}

/* out[place of a parameter] += scale times the sum of a number of each of its rows (double where `wide`), each as
   often as it counts; NULL: once. */
PASS void totals(const Piece *pieces, int64_t count, const int64_t *places, int64_t wide, const void *row,
                 const double *weights, double scale, double *out) {
    const double *doubles = row;
    const float *floats = row;
    for (int64_t p = 0; p < count; p++) {
        double lanes[LANES] = {0};
        const int64_t first = pieces[p].first, end = first + pieces[p].rows;
        for (int64_t i = first; i < end; i += LANES)
            for (int64_t j = 0; j < LANES && i + j < end; j++)
                lanes[j] += (wide ? doubles[i + j] : floats[i + j]) * (weights ? weights[i + j] : 1.0);
        out[places[p]] += scale * sum_of(lanes);
    }
}

/* What a step did: pointers that are NULL are not needed. */
typedef struct {
    float *theta, *update;              /* theta_k gives way to theta_{k+1}; u */
    const float *gradient;              /* -f */
    float *mobility, *travelled;        /* low words of m and of the sum of u without decay */
    float *decayed;                     /* instead of the latter, of sampled steps: of the sum of lr w theta_k */
    float *squares, *work;              /* of each row |u|^2 and -f.u */
    float *free_squares, *decay_work;   /* with decoupled decay |u|^2 without it and -f.theta_k */
    float *action_work;                 /* u^2 / mu, but for the numerator, where it differs by coordinate */
    float *l2_drop;                     /* with an L2 term (theta_k + theta_{k+1}).u */
    float scale, share, coarse;         /* of products; lr w; what u is multiplied by before it is held to theta */
    float numerator, epsilon, clip;     /* mu = numerator clip / (root of v + epsilon), or the numerator alone */
} Step;

PASS void close_step(const Piece *pieces, int64_t count, int64_t width, const float *const *parameters,
                     const float *const *averages, const Step *step) {
    float first[BLOCK], second[BLOCK], moved[BLOCK], room[BLOCK];
    float scale = step->scale, share = step->share, coarse = step->coarse;
    EACH_BLOCK {
        ITS_PLACE
        float *theta = step->theta + at, *u = step->update + at;
        const float *g = step->gradient + at, *after = fetch(pieces + i, parameters[i], row, n, width, first);
        for (int64_t j = 0; j < n; j++)
            u[j] = after[j] - theta[j];
        dot(u, u, n, width, scale, step->squares + line);
        if (step->free_squares) {
            for (int64_t j = 0; j < n; j++) {
                float t = theta[j], free = u[j] + share * t;
                moved[j] = t + coarse * free != t ? 1.0f : 0.0f;
                u[j] = moved[j] * free;
            }
            dot(u, u, n, width, scale, step->free_squares + line);
            dot(g, theta, n, width, scale, step->decay_work + line);
            for (int64_t j = 0; step->decayed && j < n; j++)
                step->decayed[at + j] += share * theta[j];
        } else {
            for (int64_t j = 0; j < n; j++)
                moved[j] = u[j] != 0.0f ? 1.0f : 0.0f;
        }
        dot(g, u, n, width, scale, step->work + line);
        if (step->l2_drop) {
            for (int64_t j = 0; j < n; j++)
                room[j] = theta[j] + after[j];
            dot(room, u, n, width, scale, step->l2_drop + line);
        }
        memcpy(theta, after, n * sizeof(float));
        for (int64_t j = 0; step->travelled && j < n; j++)
            step->travelled[at + j] += u[j];
        if (averages) {
            const float *v = fetch(pieces + i, averages[i], row, n, width, second);
            float *m = step->mobility + at;
            for (int64_t j = 0; j < n; j++) {
                room[j] = (sqrtf(v[j]) + step->epsilon) / step->clip;
                m[j] += step->numerator * moved[j] / room[j];
                room[j] *= u[j];
            }
            dot(room, u, n, width, scale, step->action_work + line);
        } else if (step->mobility) {
            float *m = step->mobility + at;
            for (int64_t j = 0; j < n; j++)
                m[j] += step->numerator * moved[j];
        }
    }
}

/* out <- the sum of squares of each row: whatever its size, it is not lost. */
PASS void squares(int64_t rows, int64_t width, const float *a, double *out) {
    for (int64_t row = 0; row < rows; row++, a += width) {
        double lanes[LANES] = {0};
        for (int64_t i = 0; i < width; i += LANES)
            for (int64_t j = 0; j < LANES; j++)
                lanes[j] += (double)a[i + j] * a[i + j];
        out[row] = sum_of(lanes);
    }
}

/* The sum of n squares, as exact. */
PASS double norm_squared(int64_t n, const float *a) {
    double lanes[LANES] = {0};
    for (int64_t i = 0; i + LANES <= n; i += LANES)
        for (int64_t j = 0; j < LANES; j++)
            lanes[j] += (double)a[i + j] * a[i + j];
    for (int64_t i = n / LANES * LANES; i < n; i++)
        lanes[i % LANES] += (double)a[i] * a[i];
    return sum_of(lanes);
}

/* into[bucket] <- what of it is there, each row as often as it counts; NULL: once. */
PASS void scatter(int64_t rows, int64_t width, const float *a, const double *shares, const int16_t *buckets,
                  double *into) {
    for (int64_t i = 0; i < rows * width; i++)
        into[buckets[i]] += a[i] * (shares ? shares[i / width] : 1.0);
}

/* Whoever calls compares these: a library that was built of other lines is left alone. */
int version(void) { return 4; }

int size_of_step(void) { return (int)sizeof(Step); }
