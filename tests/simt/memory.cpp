// Memory: asynchronous copies, and the checks of every access. Instrumentation that compilers know
// as ThreadSanitizer's calls the functions at the end of this file before each access; no
// sanitizer's library takes part.
#include <cstdio>

#include "emulator.h"

namespace simt {

namespace {

constexpr int64_t kNear = 64 << 10;  // how far from a buffer an access still goes by its name

enum class Kind { kRead, kWrite, kAtomic, kAsyncCopy };
constexpr const char* kVerbs[] = {"reads", "writes", "atomically changes", "copies to"};

std::vector<Region> g_buffers;

std::string file_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

uint32_t offset_in_module(const void* pc) {
    return static_cast<uint32_t>(static_cast<const char*>(pc) - g_module.begin) & 0x3fffffff;
}

// File and line, from the innermost inlined function outwards.
std::string text_of_pc(uint32_t pc) {
    char offset[16];
    std::snprintf(offset, sizeof offset, "0x%x", pc - 1);
    const std::string command = "addr2line -i -s -e '" + g_module.path + "' " + offset;
    std::string places;
    if (FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r")) {
        char line[256];
        while (std::fgets(line, sizeof line, pipe)) {
            const std::string place = line;
            places += (places.empty() ? "" : ", called from ") +
                      place.substr(0, place.find_first_of(" \n"));
        }
        pclose(pipe);
    }
    return places.empty() ? std::string("offset ") + offset : places;
}

const Region* find_region(const char* p) {
    const Block& block = *g_current->block;
    if (block.dynamic_shared.contains(p)) return &block.dynamic_shared;
    if (block.static_shared.contains(p)) return &block.static_shared;
    static size_t latest = 0;
    if (latest < g_buffers.size() && g_buffers[latest].contains(p)) return &g_buffers[latest];
    for (size_t i = 0; i < g_buffers.size(); ++i)
        if (g_buffers[i].contains(p)) return &g_buffers[latest = i];
    return nullptr;
}

// What kernels read beside buffers: their arguments and constants of the library.
bool is_constant(const char* p) {
    const char* arguments = static_cast<const char*>(g_grid->body.arguments);
    return (p >= g_module.begin && p < g_module.end) ||
           (p >= arguments && p < arguments + g_grid->body.bytes);
}

[[noreturn]] void fail_bounds(const char* p, size_t bytes, Kind kind, uint32_t pc) {
    const Region* near = nullptr;
    int64_t least = kNear;
    const auto consider = [&](const Region& r) {
        const int64_t distance = p < r.begin ? r.begin - p : p - (r.begin + r.bytes);
        if (distance < least) near = &r, least = distance;
    };
    for (const Region& r : g_buffers) consider(r);
    consider(g_current->block->dynamic_shared);
    const std::string place = near ? "byte " + std::to_string(p - near->begin) + " of " +
                                         near->name + ", which has " + std::to_string(near->bytes)
                                   : "an address in no buffer";
    fail("out of bounds: " + std::string(kVerbs[static_cast<int>(kind)]) + " " +
         std::to_string(bytes) + " bytes at " + place + ", at " + text_of_pc(pc));
}

bool ordered(const Region& region, const Access& before) {
    const Fiber& f = *g_current;
    const uint32_t threads = static_cast<uint32_t>(f.block->fibers.size());
    const uint32_t index = before.thread - f.block->number * threads;  // large in other blocks
    if (before.time < g_grid->barrier) return true;
    if (!region.shared && index >= threads) return false;
    if (before.time < f.block->barrier || static_cast<int>(index) == f.index) return true;
    return static_cast<int>(index) / kWarp == f.index / kWarp &&
           before.time < f.seen[index % kWarp];
}

void check_cell(const Region& region, size_t offset, Kind kind, uint32_t pc) {
    const Block& block = *g_current->block;
    Cell& cell = region.cells[offset / 2];
    Access& write = cell.write;
    const auto fault = [&](const std::string& before, const std::string& after) {
        fail(before + kVerbs[static_cast<int>(kind)] + " byte " + std::to_string(offset) + " of " +
             region.name + " at " + text_of_pc(pc) + after);
    };
    const auto race = [&](const char* verb, const Access& other) {
        fault("race: ", "; " + text_of_thread(other.thread) + " " + verb + " it at " +
                            text_of_pc(other.pc) + ", with no barrier between");
    };
    const bool reads = kind == Kind::kRead || kind == Kind::kAtomic;
    const bool written = !region.shared || write.time >= block.start;

    if (reads && !written) fault("", ", which no thread of the block has written");
    if (write.in_flight && written && write.time >= g_grid->barrier)
        fault("", ", to which " + text_of_thread(write.thread) + " copies asynchronously since " +
                      text_of_pc(write.pc) + " and has not waited for it");
    if (!ordered(region, write) && !(kind == Kind::kAtomic && write.atomic))
        race(kVerbs[static_cast<int>(write.atomic ? Kind::kAtomic : Kind::kWrite)], write);

    const uint32_t thread = block.number * static_cast<uint32_t>(block.fibers.size()) +
                            static_cast<uint32_t>(g_current->index);
    const Access now{thread, g_time, pc, kind == Kind::kAtomic, kind == Kind::kAsyncCopy};
    if (kind == Kind::kRead) {
        cell.reads[ordered(region, cell.reads[0]) ? 0 : 1] = now;
    } else {
        for (const Access& read : cell.reads)
            if (!ordered(region, read)) race("reads", read);
        cell = {now, {}};
    }
}

void check(const void* address, size_t bytes, Kind kind, const void* caller) {
    const char* p = static_cast<const char*>(address);
    if (!g_current || !g_checked || g_current->owns(p)) return;
    const uint32_t pc = offset_in_module(caller);
    const Region* region = find_region(p);
    if (!region && kind == Kind::kRead && is_constant(p)) return;
    if (!region || p + bytes > region->begin + region->bytes) fail_bounds(p, bytes, kind, pc);
    const size_t offset = static_cast<size_t>(p - region->begin);
    for (size_t i = offset / 2; i <= (offset + bytes - 1) / 2; ++i)
        check_cell(*region, 2 * i, kind, pc);
}

}  // namespace

void atomic_access(void* address, size_t bytes, void* caller) {
    check(address, bytes, Kind::kAtomic, caller);
}

// The bytes arrive as late as they may, at the wait; until then nobody may touch the destination.
void copy_async(void* shared, const void* global, size_t bytes, size_t zeros) {
    Fiber& f = *g_current;
    const void* caller = __builtin_return_address(0);
    const auto address = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
    if ((bytes != 4 && bytes != 8 && bytes != 16) || address % bytes != 0)
        fail("misaligned: asynchronous copy of " + std::to_string(bytes) + " bytes, at " +
             text_of_pc(offset_in_module(caller)));
    check(shared, bytes, Kind::kAsyncCopy, caller);
    if (bytes > zeros) check(global, bytes - zeros, Kind::kRead, caller);
    const Region* region = find_region(static_cast<char*>(shared));
    if (!region || !region->shared)
        fail("asynchronous copy to memory that is not shared, at " +
             text_of_pc(offset_in_module(caller)));
    f.copies.push_back(
        {static_cast<char*>(shared), static_cast<const char*>(global), bytes, zeros, f.groups});
}

void commit_copies() { ++g_current->groups; }

void wait_copies(size_t groups) {
    Fiber& f = *g_current;
    const auto arrives = [&](const Copy& copy) { return copy.group + groups < f.groups; };
    for (const Copy& copy : f.copies) {
        if (!arrives(copy)) continue;
        std::memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
        std::memset(copy.to + copy.bytes - copy.zeros, 0, copy.zeros);
        const Region& region = *find_region(copy.to);
        const size_t first = static_cast<size_t>(copy.to - region.begin) / 2;
        for (size_t i = first; g_checked && i < first + copy.bytes / 2; ++i) {
            region.cells[i].write.in_flight = false;
            region.cells[i].write.time = g_time;
        }
    }
    std::erase_if(f.copies, arrives);
}

}  // namespace simt

// ---- What tests call ---------------------------------------------------------------------------

// Global memory that kernels may touch.
extern "C" __attribute__((visibility("default"))) void simt_add_buffer(const void* begin,
                                                                       size_t bytes,
                                                                       const char* name) {
    simt::g_buffers.emplace_back(name, begin, bytes, false);
}

extern "C" __attribute__((visibility("default"))) void simt_clear_buffers() {
    simt::g_buffers.clear();
}

// ---- What instrumented code calls --------------------------------------------------------------

using simt::Kind;

extern "C" {

#define READ(name, bytes) \
    void name(void* p) { simt::check(p, bytes, Kind::kRead, __builtin_return_address(0)); }
#define WRITE(name, bytes) \
    void name(void* p) { simt::check(p, bytes, Kind::kWrite, __builtin_return_address(0)); }
READ(__tsan_read1, 1)
READ(__tsan_read2, 2)
READ(__tsan_read4, 4)
READ(__tsan_read8, 8)
READ(__tsan_read16, 16)
READ(__tsan_unaligned_read2, 2)
READ(__tsan_unaligned_read4, 4)
READ(__tsan_unaligned_read8, 8)
READ(__tsan_unaligned_read16, 16)
WRITE(__tsan_write1, 1)
WRITE(__tsan_write2, 2)
WRITE(__tsan_write4, 4)
WRITE(__tsan_write8, 8)
WRITE(__tsan_write16, 16)
WRITE(__tsan_unaligned_write2, 2)
WRITE(__tsan_unaligned_write4, 4)
WRITE(__tsan_unaligned_write8, 8)
WRITE(__tsan_unaligned_write16, 16)

void __tsan_read_range(void* p, size_t bytes) {
    simt::check(p, bytes, Kind::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
    simt::check(p, bytes, Kind::kWrite, __builtin_return_address(0));
}
void __tsan_init() { simt::g_checked = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// What both handlers get begins with the place in the source.
struct Place {
    const char* file;
    uint32_t line, column;
};
void __ubsan_handle_out_of_bounds_abort(const Place* place, intptr_t index) {
    if (!simt::g_current) std::abort();
    simt::fail("out of bounds: index " + std::to_string(index) + " of an array, at " +
               simt::file_name(place->file) + ":" + std::to_string(place->line));
}
void __ubsan_handle_type_mismatch_v1_abort(const Place* place, uintptr_t address) {
    if (!simt::g_current) std::abort();
    char hex[32];
    std::snprintf(hex, sizeof hex, "%#zx", static_cast<size_t>(address));
    simt::fail(std::string("misaligned: access to ") + hex + ", at " +
               simt::file_name(place->file) + ":" + std::to_string(place->line));
}
}
