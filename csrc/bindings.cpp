// The only file that knows pybind11: addresses and sizes in, kernels called without the GIL.
// Arguments are checked in npad/ops/__init__.py.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "packed.h"

namespace py = pybind11;

namespace {

using npad::FactorType;
namespace cpu = npad::cpu;

std::vector<const cpu::Isa*> isas() {
    const cpu::Isa* found[cpu::kMaxIsas];
    return {found, found + cpu::available_isas(found)};
}
const cpu::Isa* g_isa = isas().front();

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Address, channels, height, width and the four strides of each level.
using LevelTuples = std::vector<std::array<int64_t, 8>>;

std::vector<npad::Level> to_levels(const LevelTuples& tuples) {
    std::vector<npad::Level> levels;
    for (const auto& [address, channels, height, width, n, c, h, w] : tuples)
        levels.push_back(
            {pointer<void>(static_cast<uintptr_t>(address)), channels, height, width, n, c, h, w});
    return levels;
}

// Takes the GIL only to look for Ctrl-C and to report; an exception in either stops the kernel.
bool step(void* user, int64_t done, int64_t total) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) return false;
    const auto& report = *static_cast<py::object*>(user);
    if (report.is_none()) return true;
    PyObject* result = PyObject_CallFunction(report.ptr(), "LL", static_cast<long long>(done),
                                             static_cast<long long>(total));
    Py_XDECREF(result);
    return result != nullptr;
}

#if defined(NPAD_HAS_CUDA)
namespace cuda = npad::cuda;

// Runs a launcher on a device without the GIL; its error becomes a RuntimeError that names the op.
template <class Launcher, class... Arguments>
void launch(const char* op, int device, Launcher* launcher, Arguments... arguments) {
    int error;
    {
        const py::gil_scoped_release release;
        error = cuda::set_device(device);
        if (error == 0) error = launcher(arguments...);
    }
    if (error != 0)
        throw std::runtime_error(std::string("npad.") + op + ": " + cuda::error_name(error) + ": " +
                                 cuda::error_text(error));
}

void define_cuda(py::module_ m) {
    using cuda::Stream;
    m.doc() =
        "CUDA kernels. Addresses are on the device, which is current; streams are the caller's.";
    m.attr("architectures") = NPAD_CUDA_ARCHITECTURES;
    m.def("runtime_version", cuda::runtime_version);
    m.def("driver_version", cuda::driver_version);

    m.def("embed", [](int device, const LevelTuples& levels, FactorType type, int64_t batch,
                      int64_t height, int64_t width, uintptr_t embedding, uintptr_t stream) {
        const std::vector<npad::Level> found = to_levels(levels);
        launch("embed", device, cuda::embed, found.data(), static_cast<int64_t>(found.size()), type,
               batch, height, width, pointer<float>(embedding), reinterpret_cast<Stream>(stream));
    });
    m.def("neighborhood_moments",
          [](int device, uintptr_t x, int64_t batch, int64_t positions, int64_t channels,
             uintptr_t count, uintptr_t mean, uintptr_t scatter, uintptr_t stream) {
              launch("neighborhood_moments", device, cuda::neighborhood_moments, pointer<float>(x),
                     batch, positions, channels, pointer<int64_t>(count), pointer<float>(mean),
                     pointer<float>(scatter), reinterpret_cast<Stream>(stream));
          });
    m.def("window_covariance",
          [](int device, uintptr_t count, uintptr_t mean, uintptr_t scatter, int64_t height,
             int64_t width, int64_t channels, int64_t window, int64_t start, int64_t stop,
             uintptr_t window_mean, uintptr_t covariance, uintptr_t stream) {
              launch("window_covariance", device, cuda::window_covariance, pointer<int64_t>(count),
                     pointer<float>(mean), pointer<float>(scatter), height, width, channels, window,
                     start, stop, pointer<float>(window_mean), pointer<float>(covariance),
                     reinterpret_cast<Stream>(stream));
          });
    m.def("pack_factor", [](int device, uintptr_t factor, int64_t count, int64_t channels,
                            uintptr_t packed, FactorType type, uintptr_t stream) {
        launch("pack_factor", device, cuda::pack_factor, pointer<float>(factor), count, channels,
               pointer<void>(packed), type, reinterpret_cast<Stream>(stream));
    });
    m.def("inverse_cholesky_workspace", cuda::inverse_cholesky_workspace);
    m.def("inverse_cholesky",
          [](int device, uintptr_t covariance, int64_t count, int64_t channels, uintptr_t workspace,
             uintptr_t packed, FactorType type, uintptr_t info, uintptr_t stream) {
              launch("inverse_cholesky", device, cuda::inverse_cholesky, pointer<float>(covariance),
                     count, channels, pointer<void>(workspace), pointer<void>(packed), type,
                     pointer<int32_t>(info), reinterpret_cast<Stream>(stream));
          });
    m.def("mahalanobis", [](int device, uintptr_t x, int64_t batch, int64_t height, int64_t width,
                            int64_t channels, uintptr_t mean, uintptr_t factor, FactorType type,
                            int64_t window, uintptr_t distance, uintptr_t stream) {
        launch("mahalanobis", device, cuda::mahalanobis, pointer<float>(x), batch, height, width,
               channels, pointer<float>(mean), pointer<void>(factor), type, window,
               pointer<float>(distance), reinterpret_cast<Stream>(stream));
    });
    m.def("nearest_centroid_workspace", cuda::nearest_centroid_workspace);
    m.def("nearest_centroid", [](int device, uintptr_t x, int64_t n, uintptr_t centroids, int64_t k,
                                 int64_t channels, uintptr_t workspace, uintptr_t distance,
                                 uintptr_t index, uintptr_t stream) {
        launch("nearest_centroid", device, cuda::nearest_centroid, pointer<float>(x), n,
               pointer<float>(centroids), k, channels, pointer<void>(workspace),
               pointer<float>(distance), pointer<int64_t>(index), reinterpret_cast<Stream>(stream));
    });
    m.def("farthest_first_axes", cuda::farthest_first_axes);
    m.def("farthest_first_workspace", cuda::farthest_first_workspace);
    m.def("farthest_first",
          [](int device, uintptr_t points, int64_t n, int64_t dim, int64_t n_centroids,
             int64_t first, uintptr_t mean, uintptr_t axes, uintptr_t workspace, uintptr_t index,
             uintptr_t radius, uintptr_t stream) {
              launch("farthest_first", device, cuda::farthest_first, pointer<float>(points), n, dim,
                     n_centroids, first, pointer<float>(mean), pointer<float>(axes),
                     pointer<void>(workspace), pointer<int64_t>(index), pointer<float>(radius),
                     reinterpret_cast<Stream>(stream));
          });
    m.def("anomaly_map_workspace", cuda::anomaly_map_workspace);
    m.def("anomaly_map", [](int device, uintptr_t mahalanobis, uintptr_t euclidean, bool product,
                            double a, double b, double c, int64_t n, int64_t h, int64_t w,
                            uintptr_t row_first, uintptr_t row_taps, int64_t row_width,
                            uintptr_t column_first, uintptr_t column_taps, int64_t column_width,
                            int64_t height, int64_t width, uintptr_t workspace, uintptr_t maps,
                            uintptr_t scores, uintptr_t stream) {
        launch("anomaly_map", device, cuda::anomaly_map, pointer<float>(mahalanobis),
               pointer<float>(euclidean), product, a, b, c, n, h, w, pointer<int32_t>(row_first),
               pointer<float>(row_taps), row_width, pointer<int32_t>(column_first),
               pointer<float>(column_taps), column_width, height, width, pointer<void>(workspace),
               pointer<float>(maps), pointer<float>(scores), reinterpret_cast<Stream>(stream));
    });
    m.def("resize_maps", [](int device, uintptr_t maps, int64_t n, int64_t height, int64_t width,
                            const std::vector<int64_t>& heights, const std::vector<int64_t>& widths,
                            uintptr_t resized, uintptr_t stream) {
        launch("resize_maps", device, cuda::resize_maps, pointer<float>(maps), n, height, width,
               heights.data(), widths.data(), pointer<float>(resized),
               reinterpret_cast<Stream>(stream));
    });
}
#endif

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "Kernels of npad. Use npad.ops: nothing is checked here.";

    m.def("isas", [] {
        std::vector<std::string> names;
        for (const auto* isa : isas()) names.emplace_back(isa->name);
        return names;
    });
    m.def("isa", [] { return g_isa->name; });
    m.def("set_isa", [](const std::string& name) {
        for (const auto* isa : isas())
            if (name == isa->name) {
                g_isa = isa;
                return;
            }
        throw py::value_error("npad: instruction set '" + name + "' is not available here");
    });
    m.def("use_huge_pages", [](uintptr_t memory, int64_t bytes) {
        cpu::use_huge_pages(pointer<void>(memory), bytes);
    });
    m.def("packed_size", [](int64_t channels) { return npad::PackedLayout(channels).size(); });

    py::enum_<FactorType>(m, "FactorType")
        .value("float32", FactorType::kFloat32)
        .value("float16", FactorType::kFloat16)
        .value("bfloat16", FactorType::kBFloat16);
    m.def("embed", [](const LevelTuples& levels, FactorType type, int64_t batch, int64_t height,
                      int64_t width, uintptr_t embedding, int threads) {
        const std::vector<npad::Level> found = to_levels(levels);
        const py::gil_scoped_release release;
        g_isa->kernels.embed(found.data(), static_cast<int64_t>(found.size()), type, batch, height,
                             width, pointer<float>(embedding), threads);
    });
    m.def("neighborhood_moments",
          [](uintptr_t x, int64_t batch, int64_t positions, int64_t channels, uintptr_t count,
             uintptr_t mean, uintptr_t scatter, int threads) {
              const py::gil_scoped_release release;
              g_isa->kernels.neighborhood_moments(pointer<float>(x), batch, positions, channels,
                                                  pointer<int64_t>(count), pointer<float>(mean),
                                                  pointer<float>(scatter), threads);
          });
    m.def("window_covariance",
          [](uintptr_t count, uintptr_t mean, uintptr_t scatter, int64_t height, int64_t width,
             int64_t channels, int64_t window, int64_t start, int64_t stop, uintptr_t window_mean,
             uintptr_t covariance, int threads) {
              const py::gil_scoped_release release;
              g_isa->kernels.window_covariance(pointer<int64_t>(count), pointer<float>(mean),
                                               pointer<float>(scatter), height, width, channels,
                                               window, start, stop, pointer<float>(window_mean),
                                               pointer<float>(covariance), threads);
          });
    m.def("pack_factor",
          [](uintptr_t factor, int64_t count, int64_t channels, uintptr_t packed, int threads) {
              const py::gil_scoped_release release;
              g_isa->kernels.pack_factor(pointer<float>(factor), count, channels,
                                         pointer<float>(packed), threads);
          });
    m.def("inverse_cholesky", [](uintptr_t covariance, int64_t count, int64_t channels,
                                 uintptr_t packed, uintptr_t info, int threads) {
        const py::gil_scoped_release release;
        g_isa->kernels.inverse_cholesky(pointer<float>(covariance), count, channels,
                                        pointer<float>(packed), pointer<int32_t>(info), threads);
    });
    m.def("mahalanobis", [](uintptr_t x, int64_t batch, int64_t height, int64_t width,
                            int64_t channels, uintptr_t mean, uintptr_t factor, FactorType type,
                            int64_t window, uintptr_t distance, int threads) {
        const py::gil_scoped_release release;
        g_isa->kernels.mahalanobis(pointer<float>(x), batch, height, width, channels,
                                   pointer<float>(mean), pointer<void>(factor), type, window,
                                   pointer<float>(distance), threads);
    });
    m.def("centroid_index_axes", npad::cpu::centroid_index_axes);
    m.def("centroid_index", [](uintptr_t centroids, int64_t k, int64_t channels, uintptr_t mean,
                               uintptr_t axes, uintptr_t index, int threads) {
        const py::gil_scoped_release release;
        g_isa->kernels.centroid_index(pointer<float>(centroids), k, channels, pointer<float>(mean),
                                      pointer<float>(axes), pointer<float>(index), threads);
    });
    m.def("nearest_centroid", [](uintptr_t x, int64_t n, uintptr_t centroids, int64_t k,
                                 int64_t channels, uintptr_t index, uintptr_t distance,
                                 uintptr_t nearest, int threads) {
        const py::gil_scoped_release release;
        g_isa->kernels.nearest_centroid(pointer<float>(x), n, pointer<float>(centroids), k,
                                        channels, pointer<float>(index), pointer<float>(distance),
                                        pointer<int64_t>(nearest), threads);
    });
    m.def("farthest_first",
          [](uintptr_t points, int64_t n, int64_t dim, int64_t n_centroids, int64_t first,
             uintptr_t index, uintptr_t radius, int threads, py::object report) {
              bool finished;
              {
                  const py::gil_scoped_release release;
                  finished = g_isa->kernels.farthest_first(
                      pointer<float>(points), n, dim, n_centroids, first, pointer<int64_t>(index),
                      pointer<float>(radius), threads, {step, &report});
              }
              if (!finished) throw py::error_already_set();
          });
    m.def("anomaly_map",
          [](uintptr_t mahalanobis, uintptr_t euclidean, bool product, double a, double b, double c,
             int64_t n, int64_t h, int64_t w, uintptr_t row_first, uintptr_t row_taps,
             int64_t row_width, uintptr_t column_first, uintptr_t column_taps, int64_t column_width,
             int64_t height, int64_t width, uintptr_t maps, uintptr_t scores, int threads) {
              const py::gil_scoped_release release;
              g_isa->kernels.anomaly_map(
                  pointer<float>(mahalanobis), pointer<float>(euclidean), product, a, b, c, n, h, w,
                  pointer<int32_t>(row_first), pointer<float>(row_taps), row_width,
                  pointer<int32_t>(column_first), pointer<float>(column_taps), column_width, height,
                  width, pointer<float>(maps), pointer<float>(scores), threads);
          });
    m.def("resize_maps", [](uintptr_t maps, int64_t n, int64_t height, int64_t width,
                            const std::vector<int64_t>& heights, const std::vector<int64_t>& widths,
                            uintptr_t resized, int threads) {
        const py::gil_scoped_release release;
        g_isa->kernels.resize_maps(pointer<float>(maps), n, height, width, heights.data(),
                                   widths.data(), pointer<float>(resized), threads);
    });
#if defined(NPAD_HAS_CUDA)
    define_cuda(m.def_submodule("cuda"));
#endif
}
