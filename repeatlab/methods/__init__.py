"""What an arm may choose beside the mapping: samplers, schedules, controls."""

from repeatlab import require_lab

require_lab()
