"""Virtual machines that take memory, processors, devices and network from any computer of a lab."""

# SPDX-License-Identifier: Apache-2.0

__version__ = "0.1.0"
