// The launchers of csrc/cuda, by the names under which tests call them.
#include "simt.h"

#include "kernels.h"

namespace npad::cuda {

SIMT_EXPORT(anomaly_map)
SIMT_EXPORT(anomaly_map_workspace)
SIMT_EXPORT(centroid_index)
SIMT_EXPORT(centroid_index_bytes)
SIMT_EXPORT(embed)
SIMT_EXPORT(farthest_first)
SIMT_EXPORT(farthest_first_axes)
SIMT_EXPORT(farthest_first_workspace)
SIMT_EXPORT(inverse_cholesky)
SIMT_EXPORT(inverse_cholesky_workspace)
SIMT_EXPORT(mahalanobis)
SIMT_EXPORT(nearest_centroid)
SIMT_EXPORT(nearest_centroid_workspace)
SIMT_EXPORT(neighborhood_moments)
SIMT_EXPORT(pack_factor)
SIMT_EXPORT(resize_maps)
SIMT_EXPORT(window_covariance)

}  // namespace npad::cuda
