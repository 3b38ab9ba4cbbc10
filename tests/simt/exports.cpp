// The launchers of csrc/cuda, by the names under which tests call them.
#include "simt.h"

#include "kernels.h"

namespace npad::cuda {

SIMT_EXPORT(neighborhood_moments)
SIMT_EXPORT(window_covariance)

}  // namespace npad::cuda
