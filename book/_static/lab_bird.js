// Draws a field-guide bird of any attributes from its layers (loupe_lab.birds.painter.Bird, written by build_lab.py).

// kit: lab.json's; images: the pose's shading and the scene as drawable images. Returns a canvas, kit.size square.
export function drawBird(kit, pose, attributes, shading, scene) {
  const side = kit.size;
  const pen = sheet(side);
  for (const [layer, depends] of Object.entries(kit.order))
    for (const [path, colour, width] of kit.poses[pose].layers[layer][depends.map(a => attributes[a]).join()])
      shape(pen, kit.paths[path], colour, width);
  const bird = pen.getImageData(0, 0, side, side), light = pixels(shading, side).data;
  for (let i = 0; i < bird.data.length; i += 4)
    for (let c = 0; c < 3; c++) bird.data[i + c] *= light[i] / 128;
  pen.putImageData(bird, 0, 0);
  const picture = sheet(side);
  picture.drawImage(scene, 0, 0, side, side);
  picture.drawImage(pen.canvas, 0, 0);
  return picture.canvas;
}

function shape(pen, points, colour, width) {
  pen.beginPath();
  for (let i = 0; i < points.length; i += 2) pen.lineTo(points[i] / 10, points[i + 1] / 10);
  pen.fillStyle = pen.strokeStyle = colour;
  if (!width) return pen.fill();
  pen.lineWidth = width;
  pen.stroke();
}

export function sheet(width, height = width) {
  const canvas = Object.assign(document.createElement("canvas"), {width, height});
  return canvas.getContext("2d", {willReadFrequently: true});
}

function pixels(image, side) {
  const pen = sheet(side);
  pen.drawImage(image, 0, 0);
  return pen.getImageData(0, 0, side, side);
}
