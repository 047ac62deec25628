// Intel's matrix unit (AMX): 16 rows times 16 columns at once, from tiles of 16 rows of 64 bytes. Its tile of weights is
// 16 steps of half a panel as they lie, so it takes the same packed weights as `tile.h`; only the speed is another.
//
// A row's sums have the same order whatever rows stand beside it, here as well: one element of a tile of sums depends on
// one row and one column alone (Intel's Architectures Software Developer's Manual, TDPBF16PS and TDPBUSD).
#pragma once

#include "tile.h"

constexpr long TILE_ROWS = 16;
constexpr long TILE_STEPS = 16;

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

// Linux gives the unit to a process that asks for it, for all its threads.
static inline bool has_matrix_unit() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    static const bool given = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
    return given;
}

// Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights, for as long as this lives.
struct MatrixUnit {
    explicit MatrixUnit(long num_rows) {
        alignas(64) struct {
            uint8_t palette = 1, first_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t num_rows[16] = {};
        } shape;
        for (int i = 0; i < 8; i++) {
            shape.row_bytes[i] = 64;
            shape.num_rows[i] = i < 6 ? num_rows : TILE_STEPS;
        }
        _tile_loadconfig(&shape);
    }
    ~MatrixUnit() { _tile_release(); }
};

// Tiles have to be named by numerals.
#define ADD_PRODUCT(SUMS, ROWS, WEIGHTS)          \
    if constexpr (Kind::STEP == 2) {              \
        _tile_dpbf16ps(SUMS, ROWS, WEIGHTS);      \
    } else {                                      \
        _tile_dpbusd(SUMS, ROWS, WEIGHTS);        \
    }

// A tile of rows from `first`, and one from `second` if there is a second one, times a panel. `meanwhile` is called with
// the words that the unit was just given, to compute beside it.
template <class Kind, class Meanwhile>
static inline void matrix_tiles(
    const uint32_t* first, const uint32_t* second, long row_words, const uint32_t* panel, long steps,
    typename Kind::Sums (&sums)[2 * TILE_ROWS][2], const Meanwhile& meanwhile) {
    const long row_bytes = row_words * 4, panel_bytes = PANEL * 4, sums_bytes = sizeof sums[0];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long step = 0; step < steps; step += TILE_STEPS, panel += TILE_STEPS * PANEL) {
        _tile_loadd(4, first + step, row_bytes);
        _tile_loadd(6, panel, panel_bytes);
        ADD_PRODUCT(0, 4, 6)
        _tile_loadd(7, panel + LANES, panel_bytes);
        ADD_PRODUCT(1, 4, 7)
        if (second) {
            _tile_loadd(5, second + step, row_bytes);
            ADD_PRODUCT(2, 5, 6)
            ADD_PRODUCT(3, 5, 7)
        }
        meanwhile(panel);
    }
    _tile_stored(0, &sums[0][0], sums_bytes);
    _tile_stored(1, &sums[0][1], sums_bytes);
    if (second) {
        _tile_stored(2, &sums[TILE_ROWS][0], sums_bytes);
        _tile_stored(3, &sums[TILE_ROWS][1], sums_bytes);
    }
}

// Whether it takes rows of so many steps.
template <class Kind>
static inline bool suits_matrix_unit(long steps) {
    return Kind::STEP > 1 && steps % TILE_STEPS == 0 && has_matrix_unit();
}

#else

struct MatrixUnit {
    explicit MatrixUnit(long) {}
};

template <class Kind, class Meanwhile>
static inline void matrix_tiles(
    const uint32_t*, const uint32_t*, long, const uint32_t*, long, typename Kind::Sums (&)[2 * TILE_ROWS][2],
    const Meanwhile&) {}

template <class Kind>
static inline bool suits_matrix_unit(long) {
    return false;
}

#endif
