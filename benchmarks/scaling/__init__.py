# SPDX-License-Identifier: Apache-2.0
"""What more than one process costs and gives: the stages of a fit, and replicas on Ray."""
