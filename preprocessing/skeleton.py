"""Drawings of poses; the code is shared with training, which draws them from cached points."""

from wan_accel.data.skeleton import LIMBS, draw_pose, draw_poses

__all__ = ["LIMBS", "draw_pose", "draw_poses"]
