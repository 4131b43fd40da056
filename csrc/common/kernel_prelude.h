// Headers for CPU kernel units, included before the instruction set is chosen so that the standard
// library's and our own inline functions are compiled for the baseline in every unit: the linker
// keeps one copy of each, which must run anywhere.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "common/dtype.h"
#include "common/scratch.h"
