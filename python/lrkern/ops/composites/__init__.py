# SPDX-License-Identifier: Apache-2.0
"""Each op once more in ATen's calls, for torch.func's transforms and for LRKERN_DISABLE. A family's composites are in its file."""
