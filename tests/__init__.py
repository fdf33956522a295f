# SPDX-License-Identifier: Apache-2.0
"""A package, so that pytest leaves this folder off sys.path, where tests/peft would pass for an installed peft."""
