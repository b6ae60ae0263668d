# SPDX-License-Identifier: Apache-2.0
"""What an accelerator gives: the forward, the whole verdict, and each thing between them."""
