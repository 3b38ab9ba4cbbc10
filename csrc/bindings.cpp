// The only file that knows pybind11. A launcher of kernels.h becomes a Python function of the same
// arguments, called without the GIL: one line an op. Arguments are checked in npad/ops/__init__.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "packed.h"

namespace py = pybind11;

namespace {

using npad::DataType;
namespace cpu = npad::cpu;

std::vector<const cpu::Isa*> isas() {
    const cpu::Isa* found[cpu::kMaxIsas];
    return {found, found + cpu::available_isas(found)};
}
const cpu::Isa* g_isa = isas().front();

// What stands in Python for a launcher's parameter, and the parameter made of it.
template <class T>
struct Parameter {
    using Python = T;
    static T of(T value) { return value; }
};

template <class T>
struct Parameter<T*> {  // an address, or None for null
    using Python = std::optional<uintptr_t>;
    static T* of(Python address) { return reinterpret_cast<T*>(address.value_or(0)); }
};

template <>
struct Parameter<npad::Progress> {  // a function of (done, total), or None
    using Python = py::object;
    static npad::Progress of(py::object& report) { return {step, &report}; }

    // Takes the GIL only to look for Ctrl-C and to report; an exception in either stops the kernel.
    static bool step(void* user, int64_t done, int64_t total) {
        const py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) return false;
        const auto& report = *static_cast<py::object*>(user);
        if (report.is_none()) return true;
        PyObject* result = PyObject_CallFunction(report.ptr(), "LL", static_cast<long long>(done),
                                                 static_cast<long long>(total));
        Py_XDECREF(result);
        return result != nullptr;
    }
};

// Defines the op for the CPU. A kernel that returns false was stopped by an exception of Python.
template <class Result, class... T>
void define(py::module_& m, const char* op, Result (*cpu::Kernels::*kernel)(T...)) {
    m.def(op, [kernel](typename Parameter<T>::Python... arguments) {
        const auto run = [&] {
            const py::gil_scoped_release release;
            return (g_isa->kernels.*kernel)(Parameter<T>::of(arguments)...);
        };
        if constexpr (std::is_void_v<Result>)
            run();
        else if (!run())
            throw py::error_already_set();
    });
}

void define_cpu(py::module_& m) {
    using cpu::Kernels;
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
        cpu::use_huge_pages(reinterpret_cast<void*>(memory), bytes);
    });
    m.def("packed_size", [](int64_t channels) { return npad::PackedLayout(channels).size(); });
    m.def("byte_size", [](int64_t channels) { return npad::PackedLayout(channels).byte_size(); });
    m.def("centroid_index_axes", cpu::centroid_index_axes);
    m.def("farthest_first_axes", cpu::farthest_first_axes);

    define(m, "embed", &Kernels::embed);
    define(m, "neighborhood_moments", &Kernels::neighborhood_moments);
    define(m, "window_covariance", &Kernels::window_covariance);
    define(m, "pack_factor", &Kernels::pack_factor);
    define(m, "inverse_cholesky", &Kernels::inverse_cholesky);
    define(m, "mahalanobis", &Kernels::mahalanobis);
    define(m, "centroid_index", &Kernels::centroid_index);
    define(m, "nearest_centroid", &Kernels::nearest_centroid);
    define(m, "farthest_first", &Kernels::farthest_first);
    define(m, "anomaly_map", &Kernels::anomaly_map);
    define(m, "resize_maps", &Kernels::resize_maps);
}

#if defined(NPAD_HAS_CUDA)
namespace cuda = npad::cuda;

// Defines the op for CUDA, with the device before its arguments. An error of the launcher becomes a
// RuntimeError that names the op.
template <class... T>
void define(py::module_& m, const char* op, int (*launcher)(T...)) {
    m.def(op, [op, launcher](int device, typename Parameter<T>::Python... arguments) {
        int error;
        {
            const py::gil_scoped_release release;
            error = cuda::set_device(device);
            if (error == 0) error = launcher(Parameter<T>::of(arguments)...);
        }
        if (error != 0)
            throw std::runtime_error(std::string("npad.") + op + ": " + cuda::error_name(error) +
                                     ": " + cuda::error_text(error));
    });
}

void define_cuda(py::module_ m) {
    m.doc() =
        "CUDA kernels. Addresses are on the device, which is current; streams are the caller's.";
    m.attr("architectures") = NPAD_CUDA_ARCHITECTURES;
    m.def("runtime_version", cuda::runtime_version);
    m.def("driver_version", cuda::driver_version);
    m.def("inverse_cholesky_workspace", cuda::inverse_cholesky_workspace);
    m.def("centroid_index_bytes", cuda::centroid_index_bytes);
    m.def("nearest_centroid_workspace", cuda::nearest_centroid_workspace);
    m.def("farthest_first_axes", cuda::farthest_first_axes);
    m.def("farthest_first_workspace", cuda::farthest_first_workspace);
    m.def("anomaly_map_workspace", cuda::anomaly_map_workspace);

    define(m, "embed", cuda::embed);
    define(m, "neighborhood_moments", cuda::neighborhood_moments);
    define(m, "window_covariance", cuda::window_covariance);
    define(m, "pack_factor", cuda::pack_factor);
    define(m, "inverse_cholesky", cuda::inverse_cholesky);
    define(m, "mahalanobis", cuda::mahalanobis);
    define(m, "centroid_index", cuda::centroid_index);
    define(m, "nearest_centroid", cuda::nearest_centroid);
    define(m, "farthest_first", cuda::farthest_first);
    define(m, "anomaly_map", cuda::anomaly_map);
    define(m, "resize_maps", cuda::resize_maps);
}
#endif

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "Kernels of npad. Use npad.ops: nothing is checked here.";
    py::enum_<DataType>(m, "DataType")
        .value("float32", DataType::kFloat32)
        .value("float16", DataType::kFloat16)
        .value("bfloat16", DataType::kBFloat16)
        .value("int8", DataType::kInt8);
    define_cpu(m);
#if defined(NPAD_HAS_CUDA)
    define_cuda(m.def_submodule("cuda"));
#endif
}
