/* SPDX-License-Identifier: Apache-2.0 */
/* Planes come as kernels.h packs them, in blocks of 32 channels by 32 inputs; the card wants rows. */
#include "kernels/cuda/arch.cuh"
#include "kernels/cuda/cu.h"

__global__ void
untile(const uint8_t *tiled, uint32_t rows, uint32_t ld, uint8_t *out)
{
	size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 2;
	uint32_t r = (uint32_t)(at / ld), i = (uint32_t)(at % ld);

	if (r >= rows)
		return;
	const uint8_t *block = tiled + ((size_t)(r / 32) * (ld / 32) + i / 32) * 1024;

	*reinterpret_cast<uint16_t *>(out + at) = *reinterpret_cast<const uint16_t *>(
	    block + (r % 32 / 16 * 16 + i % 32 / 2) * 32 + r % 16 * 2);
}

__global__ void
patch(const struct cu_patch *patches, const uint4 *from, uint4 *tables)
{
	const struct cu_patch p = patches[blockIdx.x];

	for (uint32_t i = threadIdx.x; i < p.n; i += blockDim.x)
		tables[p.at + i] = from[p.from + i];
}

extern "C" void
cu_patch_tables(const struct cu_patch *p, uint32_t n, const struct kd_block *from, struct kd_block *tables, cudaStream_t stream)
{
	static_assert(sizeof(struct kd_block) == sizeof(uint4), "an entry is copied as one");
	CU_LAUNCH(patch, dim3(n), 128, 0, stream, p, reinterpret_cast<const uint4 *>(from), reinterpret_cast<uint4 *>(tables));
}

extern "C" void
cu_untile(const uint8_t *tiled, uint32_t panels, uint32_t n, uint32_t ld, uint8_t *out, cudaStream_t stream)
{
	uint32_t rows = n < panels * 32 ? n : panels * 32;

	CU_LAUNCH(untile, dim3((unsigned)(((size_t)rows * ld / 2 + 255) / 256)), 256, 0, stream, tiled, rows, ld, out);
}
