# SPDX-License-Identifier: Apache-2.0
"""Adapters as files: PEFT folders and lrkern's own files."""
