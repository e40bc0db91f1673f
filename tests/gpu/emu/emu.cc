/* SPDX-License-Identifier: Apache-2.0 */
/* Fibers, barriers and instructions of the emulation; see emu.h. */
#include "tests/gpu/emu/emu.h"

#include <cstdio>
#include <cstdlib>
#include <xmmintrin.h>

extern "C" {
#include "kernels/kernels.h"
}

#define MAX_THREADS 1024u
#define STACK_BYTES (96u << 10)
#define SHARED_BYTES (227u << 10)
#define MAX_WORDS 16u

enum wait { RUNS, AT_BARRIER, AT_WARP, ENDED };

struct fiber {
	void *sp;
	emu_coords at;
	enum wait wait;
	unsigned parity;
};

static struct fiber fibers[MAX_THREADS];
static unsigned char *stacks;
static void *scheduler_sp;
static unsigned n_fibers, current, at_barrier, n_ended;
static const std::function<void()> *body;
static const char *kernel;
static uint32_t exchanged[MAX_THREADS / 32][2][32 * MAX_WORDS];
static unsigned arrived[MAX_THREADS / 32];
static unsigned char shared_memory[SHARED_BYTES + 64];

emu_coords *emu_now;
unsigned char *emu_shared;

/* Saves what a called function must keep, on the stack; returns on the other one. */
extern "C" void emu_switch(void **from, void *to);
__asm__(".text\n.globl emu_switch\n.type emu_switch,@function\nemu_switch:\n"
    "\tpushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n"
    "\tmovq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n"
    "\tpopq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret\n"
    ".size emu_switch,.-emu_switch\n");

static void
to_scheduler(void)
{
	emu_switch(&fibers[current].sp, scheduler_sp);
}

static void
fiber_main(void)
{
	(*body)();
	fibers[current].wait = ENDED;
	n_ended++;
	to_scheduler();
	abort();
}

static void
start_fiber(unsigned i)
{
	void **sp = reinterpret_cast<void **>(stacks + (size_t)(i + 1) * STACK_BYTES);

	*--sp = nullptr; /* a return address of fiber_main() that is never used: keeps the alignment of a call */
	*--sp = reinterpret_cast<void *>(fiber_main);
	for (int r = 0; r < 6; r++)
		*--sp = nullptr;
	fibers[i].sp = sp;
	fibers[i].wait = RUNS;
	fibers[i].parity = 0;
}

void
emu_block_barrier(void)
{
	if (++at_barrier == n_fibers) { /* as CUDA: threads that ended do not count, and none may have */
		at_barrier = 0;
		for (unsigned i = 0; i < n_fibers; i++)
			if (fibers[i].wait == AT_BARRIER)
				fibers[i].wait = RUNS;
		return;
	}
	fibers[current].wait = AT_BARRIER;
	to_scheduler();
}

const uint32_t *
emu_warp_exchange(const uint32_t *mine, unsigned words)
{
	unsigned warp = current / 32, lane = current % 32, parity = fibers[current].parity;
	unsigned lanes = n_fibers - warp * 32 < 32 ? n_fibers - warp * 32 : 32;
	uint32_t *all = exchanged[warp][parity];

	memcpy(all + lane * words, mine, words * sizeof(*mine));
	fibers[current].parity = !parity;
	if (++arrived[warp] == lanes) {
		arrived[warp] = 0;
		for (unsigned i = warp * 32; i < warp * 32 + lanes; i++)
			if (fibers[i].wait == AT_WARP)
				fibers[i].wait = RUNS;
		return all;
	}
	fibers[current].wait = AT_WARP;
	to_scheduler();
	return all;
}

static void
run_block(void)
{
	n_ended = at_barrier = 0;
	memset(arrived, 0, sizeof(arrived));
	for (unsigned i = 0; i < n_fibers; i++)
		start_fiber(i);
	while (n_ended < n_fibers) {
		bool ran = false;

		for (unsigned i = 0; i < n_fibers; i++) {
			if (fibers[i].wait != RUNS)
				continue;
			ran = true;
			current = i;
			emu_now = &fibers[i].at;
			emu_switch(&scheduler_sp, fibers[i].sp);
		}
		if (!ran) {
			fprintf(stderr, "emulation: %s: threads wait for each other in different places\n", kernel);
			abort();
		}
	}
}

static void
run_grid(const char *name, dim3 grid, dim3 block, size_t smem, const std::function<void()> &f)
{
	unsigned csr = _mm_getcsr();

	if (stacks == nullptr)
		stacks = static_cast<unsigned char *>(aligned_alloc(64, (size_t)MAX_THREADS * STACK_BYTES));
	n_fibers = block.x * block.y * block.z;
	if (n_fibers == 0 || n_fibers > MAX_THREADS || block.y * block.z != 1 || smem > SHARED_BYTES ||
	    grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
		fprintf(stderr, "emulation: %s<<<(%u, %u, %u), (%u, %u, %u), %zu>>> is no launch\n", name, grid.x, grid.y, grid.z,
		    block.x, block.y, block.z, smem);
		abort();
	}
	_mm_setcsr(csr & ~0x8040u); /* devices keep subnormals */
	kernel = name;
	body = &f;
	emu_shared = reinterpret_cast<unsigned char *>((reinterpret_cast<uintptr_t>(shared_memory) + 63) & ~(uintptr_t)63);
	for (unsigned z = 0; z < grid.z; z++)
		for (unsigned y = 0; y < grid.y; y++)
			for (unsigned x = 0; x < grid.x; x++) {
				memset(emu_shared, 0x5a, smem);
				for (unsigned i = 0; i < n_fibers; i++)
					fibers[i].at = {dim3(i, 0, 0), dim3(x, y, z), block, grid};
				run_block();
			}
	_mm_setcsr(csr);
}

void
emu_launch(const char *name, dim3 grid, dim3 block, size_t smem, cudaStream_t stream, std::function<void()> f)
{
	emu_enqueue(stream, [=] { run_grid(name, grid, block, smem, f); });
}

/* ---- instructions ---- */

uint32_t
cu_prmt(uint32_t a, uint32_t b, uint32_t sel)
{
	uint64_t from = (uint64_t)b << 32 | a;
	uint32_t out = 0;

	for (int i = 0; i < 4; i++) {
		uint32_t s = sel >> (4 * i) & 15, byte = (uint32_t)(from >> (8 * (s & 7))) & 0xff;

		if (s & 8)
			byte = byte & 0x80 ? 0xff : 0;
		out |= byte << (8 * i);
	}
	return out;
}

/* One exchange instead of five shuffles; the sums are those of the butterfly. */
template <class F> static float
reduce(float v, F f)
{
	float all[32];

	memcpy(all, emu_warp_exchange(reinterpret_cast<uint32_t *>(&v), 1), sizeof(all));
	for (int o = 16; o > 0; o /= 2)
		for (int i = 0; i < o; i++)
			all[i] = f(all[i], all[i + o]);
	return all[0];
}

float
cu_warp_sum(float v)
{
	return reduce(v, [](float a, float b) { return a + b; });
}

float
cu_warp_max(float v)
{
	return reduce(v, [](float a, float b) { return fmaxf(a, b); });
}

uint32_t
cu_bf16x2(float lo, float hi)
{
	return (uint32_t)k_bf16_from_float(hi) << 16 | k_bf16_from_float(lo);
}

uint32_t
cu_e4m3x2(float lo, float hi)
{
	return (uint32_t)k_e4m3_from_float(hi) << 8 | k_e4m3_from_float(lo);
}

uint32_t
cu_mul_bf16x2(uint32_t a, uint32_t b)
{
	return cu_bf16x2(k_bf16_to_float((uint16_t)a) * k_bf16_to_float((uint16_t)b),
	    k_bf16_to_float((uint16_t)(a >> 16)) * k_bf16_to_float((uint16_t)(b >> 16)));
}

/*
 * PTX ISA, "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k32": with g = lane / 4 and t = lane % 4, register i of A
 * holds row g + 8 (i odd), columns t * n .. from half i / 2 of k; register i of B rows of half i, column g; c[i] is row
 * g + 8 (i / 2), column 2 t + i % 2. n: values in 32 bits.
 */
static float
bf16_value(uint32_t bits)
{
	bits <<= 16;
	float f;

	memcpy(&f, &bits, 4);
	return f;
}

/* Most of the emulation's time goes here. */
static const struct e4m3_values {
	float of[256];
	e4m3_values() { for (unsigned i = 0; i < 256; i++) of[i] = k_e4m3_to_float((uint8_t)i); }
} e4m3_value;

static void
mma(float c[4], const uint32_t a[4], const uint32_t b[2], bool e4m3)
{
	uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
	const uint32_t *all = emu_warp_exchange(mine, 6);
	int g = emu_lane() / 4, t = emu_lane() % 4;

	for (int i = 0; i < 4; i++) {
		int row = g + i / 2 * 8, col = 2 * t + i % 2;
		float sum = 0;

		for (int half = 0; half < 2; half++) {
			for (int s = 0; s < 4; s++) {
				uint32_t av = all[((row % 8) * 4 + s) * 6 + row / 8 + 2 * half], bv = all[(col * 4 + s) * 6 + 4 + half];

				for (int j = 0; j < (e4m3 ? 4 : 2); j++)
					sum += e4m3 ? e4m3_value.of[av >> 8 * j & 0xff] * e4m3_value.of[bv >> 8 * j & 0xff] :
					    bf16_value(av >> 16 * j & 0xffff) * bf16_value(bv >> 16 * j & 0xffff);
			}
		}
		c[i] += sum;
	}
}

void
cu_mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2])
{
	mma(c, a, b, false);
}

void
cu_mma_e4m3(float c[4], const uint32_t a[4], const uint32_t b[2])
{
	mma(c, a, b, true);
}
