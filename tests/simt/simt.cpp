// Turns: every thread of a block is a fibre, and runs until it waits for others or returns.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <cstdio>
#include <map>
#include <random>

#include "emulator.h"

namespace simt {

namespace {

constexpr size_t kStack = 128 << 10;
constexpr size_t kGuard = 4096;       // below each stack, no access
constexpr size_t kMargin = 64 << 10;  // on both sides of dynamic shared memory

std::vector<std::unique_ptr<Fiber>> g_fibers;
std::map<const void*, size_t> g_dynamic_limit;
std::string g_report;
unsigned g_order = 0;
int g_processors = 3;
size_t g_most_shared = 0;
std::mt19937 g_random;
jmp_buf g_scheduler;
thread_local volatile char t_anchor;  // so that this library has thread-local storage

void run_fiber() {
    for (;;) {
        g_grid->body.run(g_grid->body.arguments);
        g_current->state = State::kReturned;
        if (!_setjmp(g_current->resume)) _longjmp(g_scheduler, 1);
    }
}

void give_turn(Fiber& f) {
    g_current = &f;
    if (!_setjmp(g_scheduler)) {
        if (f.started) _longjmp(f.resume, 1);
        f.started = true;
        getcontext(&f.start);
        f.start.uc_stack.ss_sp = f.stack + kGuard;
        f.start.uc_stack.ss_size = kStack;
        f.start.uc_link = nullptr;
        makecontext(&f.start, run_fiber, 0);
        setcontext(&f.start);
    }
    g_current = nullptr;
}

template <typename T>
void arrange(std::vector<T>& turns) {
    if (g_order == 1) std::reverse(turns.begin(), turns.end());
    if (g_order > 1) std::shuffle(turns.begin(), turns.end(), g_random);
}

void make_resident(Block& block) {
    if (g_grid->resident == &block) return;
    const size_t bytes = g_module.static_shared_bytes;
    if (g_grid->resident)
        std::memcpy(g_grid->resident->image.data(), g_module.static_shared, bytes);
    std::memcpy(g_module.static_shared, block.image.data(), bytes);
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

// Nobody can go on: says who waits for whom.
void report_stuck() {
    std::vector<const Fiber*> all;
    for (const Block* block : g_grid->group)
        all.insert(all.end(), block->fibers.begin(), block->fibers.end());
    const Fiber& waiting = **std::min_element(
        all.begin(), all.end(), [](const Fiber* a, const Fiber* b) { return a->state < b->state; });
    const auto is_missing = [&](const Fiber* f) {
        if (waiting.state == State::kGrid) return f->state != State::kGrid;
        if (f->block != waiting.block) return false;
        if (waiting.state == State::kBlock) return f->state != State::kBlock;
        return f->index / kWarp == waiting.index / kWarp && waiting.mask >> f->index % kWarp & 1 &&
               !waits_with(*f, waiting);
    };
    const Fiber& missing = **std::find_if(all.begin(), all.end(), is_missing);
    g_report = text(waiting) + ": " + waiting.waits_at + " at " + text(waiting.where) +
               " waits for " + text(missing) + ", which " +
               (missing.state == State::kReturned
                    ? "has returned"
                    : std::string("waits in ") + missing.waits_at + " at " + text(missing.where));
}

// Runs the blocks of the group to their end; false after a fault.
bool run_group() {
    for (;;) {
        std::vector<Block*> turns = g_grid->group;
        arrange(turns);
        for (Block* block : turns)
            if (!advance(*block)) return false;
        bool returned = true, at_barrier = true;
        for (const Block* block : g_grid->group)
            for (const Fiber* f : block->fibers) {
                returned = returned && f->state == State::kReturned;
                at_barrier = at_barrier && f->state == State::kGrid;
            }
        if (returned) return true;
        if (!at_barrier) {
            report_stuck();
            return false;
        }
        g_grid->barrier = ++g_time;
        for (Block* block : g_grid->group)
            for (Fiber* f : block->fibers) f->state = State::kReady;
    }
}

void start(Block& block, uint32_t number) {
    const dim3 &g = g_grid->grid, &b = g_grid->block;
    block.number = number;
    block.index = {number % g.x, number / g.x % g.y, number / g.x / g.y};
    block.start = block.barrier = ++g_time;
    block.arrived = 0;
    block.votes = 0;
    // NaN as a float, -1 as an integer: nobody may count on what shared memory holds at the start.
    std::memset(block.storage.get() + kMargin, 0xff, block.dynamic_shared.bytes);
    block.image.assign(g_module.static_shared_bytes, static_cast<char>(0xff));
    if (g_grid->resident == &block) g_grid->resident = nullptr;
    for (unsigned t = 0; t < block.fibers.size(); ++t) {
        Fiber& f = *block.fibers[t];
        f.block = &block;
        f.index = static_cast<int>(t);
        f.thread = {t % b.x, t / b.x % b.y, t / b.x / b.y};
        f.state = State::kReady;
        f.seen.fill(0);
        f.copies.clear();
        f.groups = 0;
    }
}

int find_module(dl_phdr_info* info, size_t, void*) {
    Module module{};
    module.begin = module.end = reinterpret_cast<const char*>(info->dlpi_addr);
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        if (header.p_type == PT_LOAD)
            module.end = std::max(module.end, module.begin + header.p_vaddr + header.p_memsz);
        if (header.p_type == PT_TLS) module.static_shared_bytes = header.p_memsz;
    }
    const char* self = reinterpret_cast<const char*>(&find_module);
    if (self < module.begin || self >= module.end) return 0;
    module.static_shared = static_cast<char*>(info->dlpi_tls_data);
    Dl_info library;
    if (dladdr(self, &library)) module.path = library.dli_fname;
    g_module = module;
    return 1;
}

}  // namespace

// ---- Reports -----------------------------------------------------------------------------------

static std::string text(const uint3& v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) +
           ")";
}

std::string text(const Fiber& f) {
    return "thread " + text(f.thread) + " of block " + text(f.block->index);
}

std::string text_of_thread(uint32_t thread) {
    const dim3 &b = g_grid->block, &g = g_grid->grid;
    const uint32_t threads = b.x * b.y * b.z, t = thread % threads, n = thread / threads;
    return "thread " + text(uint3{t % b.x, t / b.x % b.y, t / b.x / b.y}) + " of block " +
           text(uint3{n % g.x, n / g.x % g.y, n / g.x / g.y});
}

std::string text(const Where& where) {
    const std::string path = where.file_name();
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line());
}

void fail(const std::string& message) {
    g_report = text(*g_current) + ": " + message;
    _longjmp(g_scheduler, 1);
}

// ---- Threads -----------------------------------------------------------------------------------

Fiber::Fiber() {
    stack = static_cast<char*>(mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stack == MAP_FAILED || mprotect(stack, kGuard, PROT_NONE) != 0) std::abort();
}

Fiber::~Fiber() { munmap(stack, kGuard + kStack); }

bool Fiber::owns(const char* p) const { return p >= stack + kGuard && p < stack + kGuard + kStack; }

void wait(State state, const char* name, const Where& where) {
    Fiber& f = *g_current;
    f.state = state;
    f.waits_at = name;
    f.where = where;
    if (!_setjmp(f.resume)) _longjmp(g_scheduler, 1);
}

void check_place(const char* name, const Where& where, const Fiber& other) {
    const Where& place = other.where;
    if (place.line() == where.line() && place.column() == where.column() &&
        std::strcmp(place.file_name(), where.file_name()) == 0)
        return;
    fail(std::string(name) + " at " + text(where) + " while " + text(other) + " waits in " +
         other.waits_at + " at " + text(place));
}

uint3 thread_index() { return g_current->thread; }
uint3 block_index() { return g_current->block->index; }
int lane() { return g_current->index % kWarp; }

void* dynamic_shared() { return g_current->block->storage.get() + kMargin; }

int block_barrier(const char* name, int value, Where where) {
    Fiber& f = *g_current;
    Block& block = *f.block;
    if (block.arrived++ == 0)
        block.first = &f;
    else
        check_place(name, where, *block.first);
    block.votes += value != 0;
    if (block.arrived < block.fibers.size()) {
        wait(State::kBlock, name, where);
    } else {
        for (Fiber* other : block.fibers) {
            other->state = State::kReady;
            other->vote = block.votes;
        }
        block.arrived = 0;
        block.votes = 0;
        block.barrier = ++g_time;
        wait(State::kReady, name, where);  // for its turn
    }
    return f.vote;
}

void grid_barrier(Where where) {
    if (!g_grid->cooperative)
        fail("grid barrier in a launch that is not cooperative, at " + text(where));
    wait(State::kGrid, "grid barrier", where);
}

// ---- Launches ----------------------------------------------------------------------------------

int processors() { return g_processors; }
size_t most_shared() { return g_most_shared; }

cudaError_t allow_dynamic_shared(const void* kernel, size_t bytes) {
    if (bytes > g_most_shared) return cudaErrorInvalidValue;
    g_dynamic_limit[kernel] = bytes;
    return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const Body& body) {
    g_report.clear();
    const dim3 g = config.grid, b = config.block;
    const size_t blocks = size_t{g.x} * g.y * g.z, threads = size_t{b.x} * b.y * b.z;
    const size_t shared = config.dynamicSmemBytes;
    const bool cooperative = config.attrs[0].val.cooperative;
    if (blocks == 0 || g.x > 0x7fffffff || g.y > 65535 || g.z > 65535 || threads == 0 ||
        threads > 1024 || b.z > 64)
        return cudaErrorInvalidConfiguration;
    const auto limit = g_dynamic_limit.find(kernel);
    if (shared > g_most_shared ||
        shared > (limit == g_dynamic_limit.end() ? 48 * 1024 : limit->second))
        return cudaErrorInvalidValue;
    if (cooperative && blocks > static_cast<size_t>(g_processors * kBlocksPerProcessor))
        return cudaErrorCooperativeLaunchTooLarge;

    t_anchor = 1;  // makes sure that the storage is there
    dl_iterate_phdr(find_module, nullptr);
    g_random.seed(g_order);
    Grid grid{g, b, cooperative, ++g_time, body, {}, nullptr};
    g_grid = &grid;
    // Only at a grid barrier do blocks wait for one another; without it they run one by one.
    std::vector<Block> alive(cooperative ? blocks : 1);
    while (g_fibers.size() < alive.size() * threads) g_fibers.push_back(std::make_unique<Fiber>());
    auto fiber = g_fibers.begin();
    for (Block& block : alive) {
        const size_t bytes = (shared + 2 * kMargin + 127) / 128 * 128;
        block.storage.reset(static_cast<char*>(std::aligned_alloc(128, bytes)));
        block.dynamic_shared = {"dynamic shared memory", block.storage.get() + kMargin, shared,
                                true};
        block.static_shared = {"static shared memory", g_module.static_shared,
                               g_module.static_shared_bytes, true};
        for (size_t t = 0; t < threads; ++t) block.fibers.push_back((fiber++)->get());
        grid.group.push_back(&block);
    }

    std::vector<uint32_t> order(blocks);
    for (uint32_t i = 0; i < blocks; ++i) order[i] = i;
    arrange(order);
    bool good = true;
    for (size_t i = 0; i < blocks && good; i += alive.size()) {
        for (size_t k = 0; k < alive.size(); ++k) start(alive[k], order[i + k]);
        good = run_group();
    }
    g_grid = nullptr;
    if (good) return cudaSuccess;
    for (auto& f : g_fibers) f->started = false;  // some stand in the middle of the kernel
    return cudaErrorLaunchFailure;
}

}  // namespace simt

dim3 simt_block_size() { return simt::g_grid->block; }
dim3 simt_grid_size() { return simt::g_grid->grid; }

// ---- What tests call ---------------------------------------------------------------------------

// Order of turns: 0 forward, 1 reverse, others shuffled from that seed. The device: how many
// processors it has, and how many bytes of shared memory a block may ask for.
extern "C" __attribute__((visibility("default"))) void simt_configure(unsigned order,
                                                                      int processors,
                                                                      size_t most_shared) {
    simt::g_order = order;
    simt::g_processors = processors;
    simt::g_most_shared = most_shared;
}

// What happened in the latest launch; empty if it went well.
extern "C" __attribute__((visibility("default"))) const char* simt_report() {
    return simt::g_report.c_str();
}
