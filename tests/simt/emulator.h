// The state that simt.cpp (turns), warp.cpp and memory.cpp share.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "simt.h"

namespace simt {

inline constexpr int kWarp = 32;

// ---- Memory (memory.cpp) -----------------------------------------------------------------------

// One access to two bytes.
struct Access {
    uint32_t thread;  // of the grid
    uint32_t time;    // 0: never
    uint32_t pc : 30, atomic : 1, in_flight : 1;
};

// What is known of two bytes. Of many readers two are kept; a write that races with any of them
// races, but for rare cases, with one of the two.
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

struct Copy {
    char* to;
    const char* from;
    size_t bytes, zeros, group;
};

// ---- Threads, blocks, grid (simt.cpp) ----------------------------------------------------------

enum class State { kReady, kWarp, kBlock, kGrid, kReturned };

struct Block;

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
    unsigned mask;                     // of the warp function that it waits at
    void* payload;                     // its part of that
    int vote;                          // result of the latest block barrier
    std::array<uint32_t, kWarp> seen;  // until when this lane has seen each lane's accesses
    std::vector<Copy> copies;
    size_t groups;  // of copies, committed

    Fiber();
    ~Fiber();
    bool owns(const char* p) const;
};

struct Block {
    uint32_t number;
    uint3 index;
    uint32_t start, barrier;  // times
    std::vector<Fiber*> fibers;
    size_t arrived;      // at the block barrier
    const Fiber* first;  // of those
    int votes;
    std::vector<char> image;  // static shared memory, while another block's is in place
    std::unique_ptr<char, Free> storage;
    Region dynamic_shared, static_shared;
};

struct Grid {
    dim3 grid, block;
    bool cooperative;
    uint32_t barrier;  // time
    Body body;
    std::vector<Block*> group;  // blocks that are alive
    Block* resident;            // whose static shared memory is in place
};

// The library that holds the kernels and this emulator.
struct Module {
    const char *begin, *end;
    std::string path;
    char* static_shared;
    size_t static_shared_bytes;
};

inline Grid* g_grid = nullptr;
inline Fiber* g_current = nullptr;
inline Module g_module{};
inline bool g_checked = false;

// Counts synchronizations. Two accesses are ordered if a barrier that both threads took part in
// stands between them, directly or through others; otherwise, if one of them writes, they race.
inline uint32_t g_time = 1;

// The current fibre waits; others make it ready again.
void wait(State state, const char* name, const Where& where);

// Whether both wait at the same warp function with the same mask (`b` may be about to).
bool waits_with(const Fiber& a, const Fiber& b);

// Threads that wait for one another do so at one place of the source: fails if the current one, in
// `name` at `where`, and `other` do not.
void check_place(const char* name, const Where& where, const Fiber& other);

// Ends the launch; the message begins with the current thread.
[[noreturn]] void fail(const std::string& message);
std::string text(const Fiber& fiber);
std::string text(const Where& where);
std::string text_of_thread(uint32_t thread);  // of the grid

}  // namespace simt
