// The emulator behind simt.h: fibres, barriers, warp functions, asynchronous copies, and the checks
// of memory. This file itself is compiled without instrumentation, once for both libraries.
#include "simt.h"

#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace {

using simt::Where;

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr size_t kPage = 4096;        // no access: below each stack
constexpr size_t kMargin = 64 << 10;  // on both sides of dynamic shared memory, to name overruns

// ---- Shadow memory -----------------------------------------------------------------------------

// Time counts synchronizations. Two accesses are ordered if a barrier that both threads took part
// in stands between them, directly or through others; everything else is a race if one of them
// writes.
uint32_t g_time = 1;

enum class Kind { kRead, kWrite, kAtomic, kAsyncCopy };

struct Access {
    uint32_t thread;  // of the grid
    uint32_t time;    // 0: never
    uint32_t pc : 30, atomic : 1, in_flight : 1;
};

// What is known of two bytes. Of many readers two are kept; a write is ordered after all of them,
// or, but for rare cases, unordered with one of the two.
struct Cell {
    Access write;
    Access reads[2];
};

struct Free {
    void operator()(void* p) const { std::free(p); }
};

struct Region {
    std::string name;
    const char* begin = nullptr;
    size_t bytes = 0;
    bool shared = false;
    std::unique_ptr<Cell[], Free> cells{};

    Region() = default;
    Region(std::string name_, const void* begin_, size_t bytes_, bool shared_)
        : name(std::move(name_)),
          begin(static_cast<const char*>(begin_)),
          bytes(bytes_),
          shared(shared_),
          // Pages that are never touched cost nothing.
          cells(static_cast<Cell*>(std::calloc(bytes_ / 2 + 1, sizeof(Cell)))) {}
    bool contains(const char* p) const { return p >= begin && p < begin + bytes; }
};

// ---- Fibres and blocks -------------------------------------------------------------------------

struct Block;

struct Copy {
    char* to;
    const char* from;
    size_t bytes, zeros, group;
    const void* pc;
};

enum class State { kReady, kWarp, kBlock, kGrid, kReturned };

struct Fiber {
    ucontext_t start;
    jmp_buf resume;
    char* stack;
    bool started = false;

    Block* block;
    int index;  // in the block
    uint3 thread;
    State state;
    const char* waits_at;
    Where where;
    unsigned mask;
    void* payload;  // of a warp function
    int vote;
    std::array<uint32_t, kWarp> seen;  // up to what time this lane has seen each lane's accesses
    std::vector<Copy> copies;
    size_t groups;

    Fiber();
    ~Fiber() { munmap(stack, kPage + kStack); }
    int lane() const { return index % kWarp; }
    bool owns(const char* p) const { return p >= stack + kPage && p < stack + kPage + kStack; }
};

struct Block {
    uint3 index;
    uint32_t number, start, barrier;
    std::vector<Fiber*> fibers;
    size_t arrived;
    int votes;
    std::vector<char> image;  // static shared memory, while another block has its place
    std::unique_ptr<char, Free> storage;
    Region dynamic_shared, static_shared;
};

thread_local volatile char t_anchor;  // so that this library has thread-local storage

struct Module {
    const char *begin = nullptr, *end = nullptr;
    std::string path;
    size_t static_shared = 0;
    char* static_shared_begin = nullptr;
};

struct Grid {
    dim3 grid, block;
    bool cooperative;
    uint32_t barrier;
    simt::Body body;
    std::vector<Block*> group;  // blocks that are alive
    Block* resident = nullptr;  // whose static shared memory is in place
};

std::vector<std::unique_ptr<Fiber>> g_fibers;
std::vector<Region> g_buffers;
std::map<const void*, size_t> g_dynamic_limit;
std::string g_report;
unsigned g_order = 0;
int g_processors = 3;
std::mt19937 g_random;
bool g_checked = false;

Module g_module;
Grid* g_grid = nullptr;
Fiber* g_current = nullptr;
jmp_buf g_scheduler;

// ---- Reports -----------------------------------------------------------------------------------

std::string text(const uint3& v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) +
           ")";
}

std::string text(const Fiber& f) {
    return "thread " + text(f.thread) + " of block " + text(f.block->index);
}

std::string text(const Where& where) {
    const std::string path = where.file_name();
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line());
}

std::string text_of_thread(uint32_t thread) {
    const dim3 &b = g_grid->block, &g = g_grid->grid;
    const uint32_t threads = b.x * b.y * b.z, t = thread % threads, n = thread / threads;
    return "thread " + text(uint3{t % b.x, t / b.x % b.y, t / b.x / b.y}) + " of block " +
           text(uint3{n % g.x, n / g.x % g.y, n / g.x / g.y});
}

uint32_t offset_in_module(const void* pc) {
    return static_cast<uint32_t>(static_cast<const char*>(pc) - g_module.begin);
}

// File and line, from the innermost inlined function outwards.
std::string text_of_pc(uint32_t pc) {
    char offset[16];
    std::snprintf(offset, sizeof offset, "0x%x", pc - 1);
    const std::string command = "addr2line -i -s -e '" + g_module.path + "' " + offset;
    std::string lines;
    if (FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r")) {
        char line[256];
        while (std::fgets(line, sizeof line, pipe)) {
            std::string place = line;
            place = place.substr(0, place.find_first_of(" \n"));
            lines += (lines.empty() ? "" : ", called from ") + place;
        }
        pclose(pipe);
    }
    return lines.empty() ? std::string("offset ") + offset : lines;
}

[[noreturn]] void fail(const std::string& message) {
    g_report = text(*g_current) + ": " + message;
    _longjmp(g_scheduler, 1);
}

[[noreturn]] void fail_at(const Where& where, const std::string& message) {
    fail(message + ", at " + text(where));
}

// ---- Turns -------------------------------------------------------------------------------------

void run_fiber() {
    for (;;) {
        g_grid->body.run(g_grid->body.arguments);
        g_current->state = State::kReturned;
        if (!_setjmp(g_current->resume)) _longjmp(g_scheduler, 1);
    }
}

Fiber::Fiber() {
    stack = static_cast<char*>(mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stack == MAP_FAILED || mprotect(stack, kPage, PROT_NONE) != 0) std::abort();
}

void give_turn(Fiber& f) {
    g_current = &f;
    if (!_setjmp(g_scheduler)) {
        if (f.started) _longjmp(f.resume, 1);
        f.started = true;
        getcontext(&f.start);
        f.start.uc_stack.ss_sp = f.stack + kPage;
        f.start.uc_stack.ss_size = kStack;
        f.start.uc_link = nullptr;
        makecontext(&f.start, run_fiber, 0);
        setcontext(&f.start);
    }
    g_current = nullptr;
}

// The current fibre waits; others make it ready again.
void wait(State state, const char* name, const Where& where) {
    Fiber& f = *g_current;
    f.state = state;
    f.waits_at = name;
    f.where = where;
    if (!_setjmp(f.resume)) _longjmp(g_scheduler, 1);
}

template <typename T>
void arrange(std::vector<T>& turns) {
    if (g_order == 1) std::reverse(turns.begin(), turns.end());
    if (g_order > 1) std::shuffle(turns.begin(), turns.end(), g_random);
}

void make_resident(Block& block) {
    const size_t bytes = g_module.static_shared;
    if (g_grid->resident == &block || bytes == 0) return;
    if (g_grid->resident)
        std::memcpy(g_grid->resident->image.data(), g_module.static_shared_begin, bytes);
    std::memcpy(g_module.static_shared_begin, block.image.data(), bytes);
    g_grid->resident = &block;
}

// Turns until every thread of the block waits or has returned; false after a fault.
bool advance(Block& block) {
    make_resident(block);
    std::vector<Fiber*> turns;
    for (;;) {
        turns.clear();
        for (Fiber* f : block.fibers)
            if (f->state == State::kReady) turns.push_back(f);
        if (turns.empty()) return true;
        arrange(turns);
        for (Fiber* f : turns) {
            give_turn(*f);
            if (!g_report.empty()) return false;
        }
    }
}

Fiber* lane_of(const Fiber& f, int lane) {
    const size_t index = static_cast<size_t>(f.index / kWarp * kWarp + lane);
    return index < f.block->fibers.size() ? f.block->fibers[index] : nullptr;
}

bool meets(const Fiber& f, const Fiber& other) {
    return other.state == State::kWarp && other.mask == f.mask &&
           std::strcmp(other.waits_at, f.waits_at) == 0;
}

// Nobody can go on: says who waits for whom.
void report_stuck() {
    const Fiber *waiting = nullptr, *missing = nullptr;
    for (const Block* block : g_grid->group)
        for (const Fiber* f : block->fibers)
            if (f->state != State::kReturned && (!waiting || f->state < waiting->state))
                waiting = f;
    if (waiting->state == State::kWarp) {
        for (int l = 0; l < kWarp && !missing; ++l)
            if (waiting->mask >> l & 1 && !meets(*waiting, *lane_of(*waiting, l)))
                missing = lane_of(*waiting, l);
    } else {
        for (const Block* block : g_grid->group)
            for (const Fiber* f : block->fibers)
                if (!missing && f->state != waiting->state &&
                    (waiting->state == State::kGrid || block == waiting->block))
                    missing = f;
    }
    g_report = text(*waiting) + ": " + waiting->waits_at + " at " + text(waiting->where) +
               " waits for " + text(*missing) + ", which " +
               (missing->state == State::kReturned
                    ? "has returned"
                    : std::string("waits in ") + missing->waits_at + " at " + text(missing->where));
}

void start(Block& block, uint32_t number) {
    const dim3 &g = g_grid->grid, &b = g_grid->block;
    block.number = number;
    block.index = {number % g.x, number / g.x % g.y, number / g.x / g.y};
    block.start = block.barrier = ++g_time;
    block.arrived = 0;
    block.votes = 0;
    // NaN as a float, -1 as an integer: nobody may count on what shared memory holds at the start.
    std::memset(const_cast<char*>(block.dynamic_shared.begin), 0xff, block.dynamic_shared.bytes);
    block.image.assign(g_module.static_shared, static_cast<char>(0xff));
    if (g_grid->resident == &block) g_grid->resident = nullptr;
    for (size_t t = 0; t < block.fibers.size(); ++t) {
        Fiber& f = *block.fibers[t];
        const unsigned i = static_cast<unsigned>(t);
        f.block = &block;
        f.index = static_cast<int>(t);
        f.thread = {i % b.x, i / b.x % b.y, i / b.x / b.y};
        f.state = State::kReady;
        f.seen.fill(0);
        f.copies.clear();
        f.groups = 0;
    }
}

// Runs the blocks of the group to their end; false after a fault.
bool run_group() {
    for (;;) {
        std::vector<Block*> turns = g_grid->group;
        arrange(turns);
        for (Block* block : turns)
            if (!advance(*block)) return false;
        size_t returned = 0, at_barrier = 0, threads = 0;
        for (const Block* block : g_grid->group)
            for (const Fiber* f : block->fibers) {
                returned += f->state == State::kReturned;
                at_barrier += f->state == State::kGrid;
                ++threads;
            }
        if (returned == threads) return true;
        if (at_barrier < threads) {
            report_stuck();
            return false;
        }
        g_grid->barrier = ++g_time;
        for (Block* block : g_grid->group)
            for (Fiber* f : block->fibers) f->state = State::kReady;
    }
}

int find_module(dl_phdr_info* info, size_t, void*) {
    const auto* base = reinterpret_cast<const char*>(info->dlpi_addr);
    const char* self = reinterpret_cast<const char*>(&find_module);
    Module module;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        if (header.p_type == PT_LOAD)
            module.end = std::max(module.end, base + header.p_vaddr + header.p_memsz);
        if (header.p_type == PT_TLS) module.static_shared = header.p_memsz;
    }
    if (self < base || self >= module.end) return 0;
    module.begin = base;
    module.static_shared_begin = static_cast<char*>(info->dlpi_tls_data);
    Dl_info library;
    if (dladdr(self, &library)) module.path = library.dli_fname;
    g_module = module;
    return 1;
}

// ---- Memory checks -----------------------------------------------------------------------------

bool ordered(const Region& region, const Access& before) {
    const Fiber& f = *g_current;
    const uint32_t threads = static_cast<uint32_t>(f.block->fibers.size());
    const uint32_t first = f.block->number * threads, index = before.thread - first;
    if (before.time < g_grid->barrier) return true;
    const bool same_block = region.shared || (before.thread >= first && index < threads);
    if (!same_block) return false;
    if (before.time < f.block->barrier || static_cast<int>(index) == f.index) return true;
    const int warp = static_cast<int>(index) / kWarp;
    return warp == f.index / kWarp && before.time < f.seen[index % kWarp];
}

[[noreturn]] void fail_race(const Region& region, size_t offset, const char* verb, uint32_t pc,
                            const char* verb_before, const Access& before) {
    fail("race: " + std::string(verb) + " byte " + std::to_string(offset) + " of " + region.name +
         " at " + text_of_pc(pc) + "; " + text_of_thread(before.thread) + " " + verb_before +
         " it at " + text_of_pc(before.pc) + ", with no barrier between");
}

void check_cell(const Region& region, size_t offset, Kind kind, uint32_t pc) {
    Cell& cell = region.cells[offset / 2];
    const Fiber& f = *g_current;
    static constexpr const char* kVerbs[] = {"reads", "writes", "atomically changes", "copies to"};
    const char* verb = kVerbs[static_cast<int>(kind)];
    const Access now{f.block->number * static_cast<uint32_t>(f.block->fibers.size()) +
                         static_cast<uint32_t>(f.index),
                     g_time, pc & 0x3fffffff, kind == Kind::kAtomic, kind == Kind::kAsyncCopy};
    const bool stale = region.shared && cell.write.time < f.block->start;

    if (stale && (kind == Kind::kRead || kind == Kind::kAtomic))
        fail(std::string(verb) + " byte " + std::to_string(offset) + " of " + region.name +
             ", which no thread of the block has written, at " + text_of_pc(pc));
    if (!stale && cell.write.in_flight && cell.write.time >= g_grid->barrier)
        fail(std::string(verb) + " byte " + std::to_string(offset) + " of " + region.name + " at " +
             text_of_pc(pc) + ", to which " + text_of_thread(cell.write.thread) +
             " copies asynchronously since " + text_of_pc(cell.write.pc) +
             " and has not waited for it");
    if (!ordered(region, cell.write) && !(kind == Kind::kAtomic && cell.write.atomic))
        fail_race(region, offset, verb, pc, cell.write.atomic ? "atomically changes" : "writes",
                  cell.write);
    if (kind == Kind::kRead) {
        const bool first = cell.reads[0].thread == now.thread || ordered(region, cell.reads[0]);
        cell.reads[first ? 0 : 1] = now;
    } else {
        for (const Access& read : cell.reads)
            if (!ordered(region, read)) fail_race(region, offset, verb, pc, "reads", read);
        cell = {now, {}};
    }
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

[[noreturn]] void fail_bounds(const char* p, size_t bytes, Kind kind, uint32_t pc) {
    const Region* near = nullptr;
    ptrdiff_t least = kMargin;
    const auto consider = [&](const Region& r) {
        const ptrdiff_t distance = p < r.begin ? r.begin - p : p - (r.begin + r.bytes);
        if (r.begin && distance < least) near = &r, least = distance;
    };
    for (const Region& r : g_buffers) consider(r);
    consider(g_current->block->dynamic_shared);
    fail("out of bounds: " + std::string(kind == Kind::kRead ? "reads " : "writes ") +
         std::to_string(bytes) + " bytes at " +
         (near ? "byte " + std::to_string(p - near->begin) + " of " + near->name + ", which has " +
                     std::to_string(near->bytes)
               : "an address in no buffer") +
         ", at " + text_of_pc(pc));
}

void check(const void* address, size_t bytes, Kind kind, const void* caller) {
    if (!g_current || !g_checked) return;
    const char* p = static_cast<const char*>(address);
    if (g_current->owns(p)) return;
    const uint32_t pc = offset_in_module(caller);
    const Region* region = find_region(p);
    if (!region) {
        const char* arguments = static_cast<const char*>(g_grid->body.arguments);
        const bool constant =
            kind == Kind::kRead && ((p >= g_module.begin && p < g_module.end) ||
                                    (p >= arguments && p < arguments + g_grid->body.bytes));
        if (constant) return;
        fail_bounds(p, bytes, kind, pc);
    }
    const size_t offset = static_cast<size_t>(p - region->begin);
    if (offset + bytes > region->bytes) fail_bounds(p, bytes, kind, pc);
    for (size_t i = offset / 2; i <= (offset + bytes - 1) / 2; ++i)
        check_cell(*region, 2 * i, kind, pc);
}

// ---- Warp functions ----------------------------------------------------------------------------

using Lanes = std::array<Fiber*, kWarp>;  // null where the mask has no bit

// The last lane of the mask to arrive does the work for all, on the payloads of all.
void meet(const char* name, unsigned mask, void* payload, void (*work)(const Lanes&), Where where) {
    Fiber& f = *g_current;
    const std::string call = std::string(name) + " with a mask that ";
    if (!(mask >> f.lane() & 1)) fail_at(where, call + "does not name the calling lane");
    f.mask = mask;
    f.waits_at = name;
    f.payload = payload;
    Lanes lanes{};
    bool all = true;
    for (int l = 0; l < kWarp; ++l) {
        if (!(mask >> l & 1)) continue;
        lanes[l] = lane_of(f, l);
        if (!lanes[l])
            fail_at(where, call + "names lane " + std::to_string(l) + ", beyond the block");
        if (lanes[l]->state == State::kReturned)
            fail_at(where, call + "names lane " + std::to_string(l) + ", which has returned");
        all = all && (lanes[l] == &f || meets(f, *lanes[l]));
    }
    if (!all) return wait(State::kWarp, name, where);
    work(lanes);
    for (Fiber* lane : lanes)
        if (lane) lane->state = State::kReady;
    wait(State::kReady, name, where);  // for its turn
}

template <typename T>
T& payload(Fiber* f) {
    return *static_cast<T*>(f->payload);
}

struct Shuffle {
    uint64_t value, result;
    int source;
};

struct Ballot {
    bool value;
    unsigned result;
};

struct Reduce {
    int64_t value, result;
    simt::Reduction op;
};

struct Product {
    simt::Element type;
    float (*c)[4];
    const uint32_t (*a)[4];
    const uint32_t (*b)[2];
};

void join_clocks(const Lanes& lanes) {
    ++g_time;
    std::array<uint32_t, kWarp> seen{};
    for (const Fiber* f : lanes)
        for (int l = 0; f && l < kWarp; ++l) seen[l] = std::max(seen[l], f->seen[l]);
    for (int l = 0; l < kWarp; ++l)
        if (lanes[l]) seen[l] = g_time;
    for (Fiber* f : lanes)
        if (f) f->seen = seen;
}

int64_t combine(simt::Reduction op, int64_t a, int64_t b) {
    switch (op) {
        case simt::Reduction::kAdd:
            return a + b;
        case simt::Reduction::kMin:
            return std::min(a, b);
        case simt::Reduction::kMax:
            return std::max(a, b);
        case simt::Reduction::kAnd:
            return a & b;
        case simt::Reduction::kOr:
            return a | b;
        case simt::Reduction::kXor:
            return a ^ b;
    }
    std::abort();
}

// Elements of one 32-bit word of a fragment; returns how many.
int decode(simt::Element type, uint32_t word, double out[2]) {
    const auto lower = static_cast<unsigned short>(word),
               upper = static_cast<unsigned short>(word >> 16);
    switch (type) {
        case simt::Element::kTf32:
            out[0] = __uint_as_float(word & ~0x1fffu);
            return 1;
        case simt::Element::kFloat16:
            out[0] = __half2float({lower}), out[1] = __half2float({upper});
            return 2;
        case simt::Element::kBFloat16:
            out[0] = __bfloat162float({lower}), out[1] = __bfloat162float({upper});
            return 2;
    }
    std::abort();
}

// The matrices are put together from the fragments, multiplied, and dealt out again.
void multiply(const Lanes& lanes) {
    double a[16][16], b[8][16];  // rows of a, columns of b
    int per_word = 1;
    for (int l = 0; l < kWarp; ++l) {
        const Product& p = payload<Product>(lanes[l]);
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; ++i) {
            double values[2];
            per_word = decode(p.type, (*p.a)[i], values);
            for (int v = 0; v < per_word; ++v)
                a[g + i % 2 * 8][(t + i / 2 * 4) * per_word + v] = values[v];
        }
        for (int i = 0; i < 2; ++i) {
            double values[2];
            decode(p.type, (*p.b)[i], values);
            for (int v = 0; v < per_word; ++v) b[g][(t + i * 4) * per_word + v] = values[v];
        }
    }
    for (int l = 0; l < kWarp; ++l)
        for (int i = 0; i < 4; ++i) {
            float& c = (*payload<Product>(lanes[l]).c)[i];
            double sum = c;
            for (int k = 0; k < 8 * per_word; ++k)
                sum += a[l / 4 + i / 2 * 8][k] * b[l % 4 * 2 + i % 2][k];
            c = static_cast<float>(sum);
        }
}

}  // namespace

// ---- What kernels call -------------------------------------------------------------------------

dim3 simt_block_size() { return g_grid->block; }
dim3 simt_grid_size() { return g_grid->grid; }

namespace simt {

uint3 thread_index() { return g_current->thread; }
uint3 block_index() { return g_current->block->index; }
int lane() { return g_current->lane(); }
int processors() { return g_processors; }

void* dynamic_shared() { return const_cast<char*>(g_current->block->dynamic_shared.begin); }

int block_barrier(const char* name, int value, Where where) {
    Block& block = *g_current->block;
    for (const Fiber* f : block.fibers)
        if (f->state == State::kBlock && (f->where.line() != where.line() ||
                                          std::strcmp(f->where.file_name(), where.file_name())))
            fail_at(where, std::string(name) + " while " + text(*f) + " waits in " + f->waits_at +
                               " at " + text(f->where));
    block.votes += value != 0;
    if (++block.arrived < block.fibers.size()) {
        wait(State::kBlock, name, where);
    } else {
        for (Fiber* f : block.fibers) {
            f->state = State::kReady;
            f->vote = block.votes;
        }
        block.arrived = 0;
        block.votes = 0;
        block.barrier = ++g_time;
        wait(State::kReady, name, where);  // for its turn
    }
    return g_current->vote;
}

void grid_barrier(Where where) {
    if (!g_grid->cooperative) fail_at(where, "grid barrier in a launch that is not cooperative");
    wait(State::kGrid, "grid barrier", where);
}

void warp_barrier(unsigned mask, Where where) {
    meet("__syncwarp", mask, nullptr, join_clocks, where);
}

uint64_t shuffle(const char* name, unsigned mask, uint64_t value, int source, Where where) {
    if (!(mask >> source & 1))
        fail_at(where, std::string(name) + " reads lane " + std::to_string(source) +
                           ", which the mask does not name");
    Shuffle mine{value, 0, source};
    meet(
        name, mask, &mine,
        [](const Lanes& lanes) {
            for (Fiber* f : lanes)
                if (f) {
                    Shuffle& s = payload<Shuffle>(f);
                    s.result = payload<Shuffle>(lanes[s.source]).value;
                }
        },
        where);
    return mine.result;
}

unsigned ballot(const char* name, unsigned mask, bool value, Where where) {
    Ballot mine{value, 0};
    meet(
        name, mask, &mine,
        [](const Lanes& lanes) {
            unsigned bits = 0;
            for (int l = 0; l < kWarp; ++l)
                if (lanes[l]) bits |= unsigned{payload<Ballot>(lanes[l]).value} << l;
            for (Fiber* f : lanes)
                if (f) payload<Ballot>(f).result = bits;
        },
        where);
    return mine.result;
}

static int64_t reduce_wide(const char* name, unsigned mask, Reduction op, int64_t value,
                           Where where) {
    Reduce mine{value, 0, op};
    meet(
        name, mask, &mine,
        [](const Lanes& lanes) {
            const Reduce* result = nullptr;
            int64_t total = 0;
            for (Fiber* f : lanes)
                if (f) {
                    const Reduce& r = payload<Reduce>(f);
                    total = result ? combine(r.op, total, r.value) : r.value;
                    result = &r;
                }
            for (Fiber* f : lanes)
                if (f) payload<Reduce>(f).result = total;
        },
        where);
    return mine.result;
}
unsigned reduce(const char* name, unsigned mask, Reduction op, unsigned value, Where where) {
    return static_cast<unsigned>(reduce_wide(name, mask, op, value, where));
}
int reduce(const char* name, unsigned mask, Reduction op, int value, Where where) {
    return static_cast<int>(reduce_wide(name, mask, op, value, where));
}

void mma(Element type, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
    Product mine{type, &c, &a, &b};
    meet("mma", 0xffffffff, &mine, multiply, where);
}

void atomic_access(void* address, size_t bytes, void* caller) {
    check(address, bytes, Kind::kAtomic, caller);
}

// Bytes arrive as late as they may, at the wait; until then nobody may touch either end.
void copy_async(void* shared, const void* global, size_t bytes, size_t zeros) {
    const void* pc = __builtin_return_address(0);
    const auto misaligned = [bytes](const void* p) {
        return reinterpret_cast<uintptr_t>(p) % bytes != 0;
    };
    if ((bytes != 4 && bytes != 8 && bytes != 16) || misaligned(shared) || misaligned(global))
        fail("misaligned: asynchronous copy of " + std::to_string(bytes) + " bytes, at " +
             text_of_pc(offset_in_module(pc)));
    check(shared, bytes, Kind::kAsyncCopy, pc);
    const Region* to = find_region(static_cast<char*>(shared));
    if (!to || !to->shared)
        fail("asynchronous copy to memory that is not shared, at " +
             text_of_pc(offset_in_module(pc)));
    if (bytes > zeros) check(global, bytes - zeros, Kind::kRead, pc);
    Fiber& f = *g_current;
    f.copies.push_back(
        {static_cast<char*>(shared), static_cast<const char*>(global), bytes, zeros, f.groups, pc});
}

void commit_copies() { ++g_current->groups; }

void wait_copies(size_t groups) {
    Fiber& f = *g_current;
    const auto arrives = [&](const Copy& copy) { return copy.group + groups < f.groups; };
    for (const Copy& copy : f.copies) {
        if (!arrives(copy)) continue;
        std::memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
        std::memset(copy.to + copy.bytes - copy.zeros, 0, copy.zeros);
        if (!g_checked) continue;
        const Region& region = *find_region(copy.to);
        const size_t first = static_cast<size_t>(copy.to - region.begin) / 2;
        for (size_t i = first; i < first + copy.bytes / 2; ++i) {
            region.cells[i].write.in_flight = false;
            region.cells[i].write.time = g_time;
        }
    }
    std::erase_if(f.copies, arrives);
}

cudaError_t allow_dynamic_shared(const void* kernel, size_t bytes) {
    if (bytes > kMostShared) return cudaErrorInvalidValue;
    g_dynamic_limit[kernel] = bytes;
    return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const Body& body) {
    g_report.clear();
    const dim3 g = config.grid, b = config.block;
    const size_t blocks = size_t{g.x} * g.y * g.z, threads = size_t{b.x} * b.y * b.z;
    const bool cooperative = config.numAttrs > 0 && config.attrs[0].val.cooperative;
    if (blocks == 0 || g.x > 0x7fffffff || g.y > 65535 || g.z > 65535 || threads == 0 ||
        threads > 1024 || b.z > 64)
        return cudaErrorInvalidConfiguration;
    const auto limit = g_dynamic_limit.find(kernel);
    if (config.dynamicSmemBytes > (limit == g_dynamic_limit.end() ? 48 * 1024 : limit->second))
        return cudaErrorInvalidValue;
    if (cooperative && blocks > static_cast<size_t>(g_processors * kBlocksPerProcessor))
        return cudaErrorCooperativeLaunchTooLarge;

    t_anchor = 1;  // makes sure that the storage is there
    dl_iterate_phdr(find_module, nullptr);
    g_random.seed(g_order);
    Grid grid{g, b, cooperative, ++g_time, body, {}};
    g_grid = &grid;
    std::vector<Block> alive(cooperative ? blocks : 1);
    while (g_fibers.size() < alive.size() * threads) g_fibers.push_back(std::make_unique<Fiber>());
    for (size_t i = 0; i < alive.size(); ++i) {
        Block& block = alive[i];
        const size_t bytes = config.dynamicSmemBytes, all = bytes + 2 * kMargin;
        block.storage.reset(static_cast<char*>(std::aligned_alloc(128, (all + 127) / 128 * 128)));
        block.dynamic_shared = {"dynamic shared memory", block.storage.get() + kMargin, bytes,
                                true};
        block.static_shared = {"static shared memory", g_module.static_shared_begin,
                               g_module.static_shared, true};
        for (size_t t = 0; t < threads; ++t)
            block.fibers.push_back(g_fibers[i * threads + t].get());
        grid.group.push_back(&block);
    }

    std::vector<uint32_t> order(blocks);
    for (size_t i = 0; i < blocks; ++i) order[i] = static_cast<uint32_t>(i);
    arrange(order);
    bool good = true;
    for (size_t i = 0; i < blocks && good; i += alive.size()) {
        for (size_t k = 0; k < alive.size(); ++k)
            start(alive[k], cooperative ? static_cast<uint32_t>(k) : order[i]);
        good = run_group();
    }
    g_grid = nullptr;
    if (good) return cudaSuccess;
    for (auto& f : g_fibers) f->started = false;  // some stand in the middle of the kernel
    return cudaErrorLaunchFailure;
}

}  // namespace simt

// ---- What tests call ---------------------------------------------------------------------------

#define EXPORT extern "C" __attribute__((visibility("default")))

// Order of turns: 0 forward, 1 reverse, others shuffled from that seed.
EXPORT void simt_configure(unsigned order, int processors) {
    g_order = order;
    g_processors = processors;
}

// Global memory that kernels may touch.
EXPORT void simt_add_buffer(const void* begin, size_t bytes, const char* name) {
    g_buffers.emplace_back(name, begin, bytes, false);
}

EXPORT void simt_clear_buffers() { g_buffers.clear(); }

EXPORT const char* simt_report() { return g_report.c_str(); }

// ---- What instrumented code calls --------------------------------------------------------------

#define ACCESSES(bytes)                                             \
    extern "C" void __tsan_read##bytes(void* p) {                   \
        check(p, bytes, Kind::kRead, __builtin_return_address(0));  \
    }                                                               \
    extern "C" void __tsan_write##bytes(void* p) {                  \
        check(p, bytes, Kind::kWrite, __builtin_return_address(0)); \
    }                                                               \
    extern "C" void __tsan_unaligned_read##bytes(void* p) {         \
        check(p, bytes, Kind::kRead, __builtin_return_address(0));  \
    }                                                               \
    extern "C" void __tsan_unaligned_write##bytes(void* p) {        \
        check(p, bytes, Kind::kWrite, __builtin_return_address(0)); \
    }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

extern "C" {
void __tsan_init() { g_checked = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* p, size_t bytes) {
    check(p, bytes, Kind::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
    check(p, bytes, Kind::kWrite, __builtin_return_address(0));
}

// What both handlers get begins with the place in the source.
struct SourceLocation {
    const char* file;
    uint32_t line, column;
};
static std::string text_of(const SourceLocation& place) {
    const std::string path = place.file;
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(place.line);
}
void __ubsan_handle_out_of_bounds_abort(const SourceLocation* place, uintptr_t index) {
    if (!g_current) std::abort();
    fail("out of bounds: index " + std::to_string(static_cast<intptr_t>(index)) +
         " of an array, at " + text_of(*place));
}
void __ubsan_handle_type_mismatch_v1_abort(const SourceLocation* place, uintptr_t address) {
    if (!g_current) std::abort();
    char hex[32];
    std::snprintf(hex, sizeof hex, "0x%zx", static_cast<size_t>(address));
    fail(std::string("misaligned: access to ") + hex + ", at " + text_of(*place));
}
}
