// The launchers of csrc/cuda, by the names under which tests call them.
#include "simt.h"

#include "kernels.h"

namespace npad::cuda {

SIMT_EXPORT(mahalanobis)
SIMT_EXPORT(pack_factor)
SIMT_EXPORT(neighborhood_moments)

}  // namespace npad::cuda
