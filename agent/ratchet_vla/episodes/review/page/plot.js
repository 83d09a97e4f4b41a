// Lines over time on a canvas, with shaded spans and a cursor. Knows numbers, not episodes.
const COLOURS = ["#3b82f6", "#10b981", "#f59e0b", "#ef4444", "#8b5cf6", "#14b8a6", "#ec4899", "#84cc16", "#64748b"];

function fit(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  return { pen, width, height };
}

// Each line is scaled to its own range: what matters is when something changes. Returns the picture without a cursor.
export function drawLines(canvas, times, series, spans, events, length) {
  const { pen, width, height } = fit(canvas);
  const x = (time) => (time / (length || 1)) * (width - 2) + 1;
  pen.clearRect(0, 0, width, height);
  for (const { from, to, colour } of spans) {
    pen.fillStyle = colour;
    pen.fillRect(x(from), 0, Math.max(x(to) - x(from), 1.5), height);
  }
  pen.font = "11px system-ui";
  let label = 4;
  Object.entries(series).forEach(([name, values], number) => {
    const known = values.filter((v) => v !== null);
    if (!known.length) return;
    const low = Math.min(...known), high = Math.max(...known), range = high - low || 1;
    pen.strokeStyle = COLOURS[number % COLOURS.length];
    pen.lineWidth = 1.2;
    pen.beginPath();
    let down = false;
    values.forEach((value, i) => {
      if (value === null) { down = false; return; }
      const y = height - 4 - ((value - low) / range) * (height - 22);
      if (down) pen.lineTo(x(times[i]), y); else pen.moveTo(x(times[i]), y);
      down = true;
    });
    pen.stroke();
    pen.fillStyle = pen.strokeStyle;
    if (label < width - 60) { pen.fillText(name, label, 11); label += pen.measureText(name).width + 8; }
  });
  pen.fillStyle = "#c0392b";
  for (const event of events) pen.fillRect(x(event.time), height - 6, 2, 6);
  return pen.getImageData(0, 0, canvas.width, canvas.height);
}

export function drawCursor(canvas, picture, share) {
  if (!picture) return;
  const pen = canvas.getContext("2d");
  pen.putImageData(picture, 0, 0);
  pen.save();
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.fillStyle = "#ef4444";
  pen.fillRect(Math.round(share * (canvas.width - 2)), 0, 2, canvas.height);
  pen.restore();
}
