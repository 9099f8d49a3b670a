// What follows from the macros of shared_scan.cu: sizes, how tiles lie in shared memory. Pasted into it after Params; no file of its
// own.

#if BAKED
#define SIZE(constant, field) (constant)
#else
#define SIZE(constant, field) ((int)p.field)
#endif
#define HEIGHT_OF SIZE(HEIGHT, height)
#define WIDTH_OF SIZE(WIDTH, width)
#define LENGTH_OF (HEIGHT_OF * WIDTH_OF)
#define GROUPS_OF SIZE(GROUPS, groups)
#define ROWS_OF SIZE(ROWS_TILE, rows_tile)
#define COLUMNS_OF SIZE(COLUMNS_TILE, columns_tile)
#define SKEW_OF SIZE(SKEW, skew)
// A gap after as many lines as a thread takes of a column; then half as many floats do what SKEW halves do.
#if BAKED && ITEMS == 16 && HEIGHT % 16 == 0
#define SKEW_LINES 16
#define SUM_SKEW (SKEW_OF / 2)
#else
#define SKEW_LINES 8
#define SUM_SKEW SKEW_OF
#endif
// Which ways of reading a tile can occur: kinds of `Steps`.
#define LINES 0
#define COLUMNS 1
#define SCATTERED 2
#if BAKED
#define MAYBE_COLUMNS (!TABLE && (DIRECTIONS & 0x1111111111111111ull) != 0)
#define MAYBE_SCATTERED                                                                                              \
    (TABLE || (DIRECTIONS & 0x4444444444444444ull) != 0 || (MAYBE_COLUMNS && HEIGHT % 8 != 0) ||                     \
     ((DIRECTIONS & 0x2222222222222222ull) != 0 && HEIGHT * WIDTH % 8 != 0))
#else
#define MAYBE_COLUMNS 1
#define MAYBE_SCATTERED 1
#endif
#define ONE_TILE (ROWS_OF >= LENGTH_OF && COLUMNS_OF >= WIDTH_OF)
// Elements in a line of a tile of columns; a constant where that is faster: not for whole maps, as measured.
#if BAKED
#define COLUMN_LINE(line) (!ONE_TILE && WIDTH % COLUMNS_TILE == 0 ? COLUMNS_TILE : line)
#else
#define COLUMN_LINE(line) line
#endif
// Every step of every thread lies within its tile.
#if BAKED
#define WHOLE_TILES                                                                                              \
    (TEAM_THREADS * ITEMS == ROWS_TILE && HEIGHT * WIDTH % ROWS_TILE == 0 &&                                     \
     (!MAYBE_COLUMNS || (HEIGHT * COLUMNS_TILE == ROWS_TILE && WIDTH % COLUMNS_TILE == 0)))
#else
#define WHOLE_TILES 0
#endif
#define TEAM_WARPS (TEAM_THREADS / 32)
#define WARP_SLOTS (TEAM_WARPS > 16 ? 32 : TEAM_WARPS > 8 ? 16 : TEAM_WARPS > 4 ? 8 : TEAM_WARPS > 2 ? 4 : TEAM_WARPS)
#define PRODUCER (BULK && LOOPS)
#define THREADS (TEAMS * (TEAM_THREADS + 32 * PRODUCER))
#define FULL 0xffffffffu
// y was made with dt in base 2.
#define OUT_SCALE (LINEAR ? 1.f : LN2)
// What a span of steps multiplies a state with is 2 to the power of A times its sum of dt. With several states those sums are
// made once and serve all of them; with one, or where only the factors are given, factors are multiplied up.
#define SUMS (!LINEAR && NSTATE > 1)
#if LINEAR
#define FRONT_SLOTS 0
#define FRONT_BYTES 0
#define STATE_BYTES (CAP * (Element<DELTA_TYPE>::bytes + RANK * Element<B_TYPE>::bytes + Element<C_TYPE>::bytes))
#else
#define FRONT_SLOTS ((STAGES * PAIR + NSTATE - 1) / NSTATE)
#define FRONT_BYTES (CAP * (Element<DELTA_TYPE>::bytes + RANK * Element<U_TYPE>::bytes))
#define STATE_BYTES (CAP * (Element<B_TYPE>::bytes + Element<C_TYPE>::bytes))
#endif
#define STAGE_BYTES (PAIR * STATE_BYTES)
#define TEAM_BYTES (STAGES * STAGE_BYTES + FRONT_SLOTS * FRONT_BYTES)
