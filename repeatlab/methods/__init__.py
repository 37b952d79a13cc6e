"""What an arm may choose beside the mapping: samplers, schedules, controls."""
