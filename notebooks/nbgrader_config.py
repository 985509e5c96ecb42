"""nbgrader's settings for this course: copy this file into the empty folder of your class, and work there."""

from dsa_course.grading import PREPROCESSORS

c = get_config()  # noqa: F821 (nbgrader gives it to this file)
c.CourseDirectory.course_id = "dsa"
c.GenerateAssignment.preprocessors = PREPROCESSORS
c.Execute.timeout = 120  # seconds for a cell: Triton's interpreter is slow
