package main

import (
	"context"
	"image/color"
	"os"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	vgdraw "gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// This file is the picture: what a cached token costs as goroutines grow, and what
// it costs to attach one.

var colors = []color.Color{
	color.RGBA{0x9a, 0xa5, 0xb1, 255}, color.RGBA{0x1f, 0x5f, 0xbf, 255}, color.RGBA{0xb3, 0x26, 0x1e, 255},
	color.RGBA{0xd9, 0x8a, 0x1a, 255}, color.RGBA{0x14, 0x73, 0x3c, 255}, color.RGBA{0x7a, 0x3f, 0xa0, 255},
}

// draw writes both, side by side.
func draw(file string) error {
	left, err := growth()
	if err != nil {
		return err
	}
	right, err := attaching()
	if err != nil {
		return err
	}
	canvas := vgsvg.New(26*vg.Centimeter, 11*vg.Centimeter)
	both := vgdraw.New(canvas)
	left.Draw(vgdraw.Crop(both, 0, -10*vg.Centimeter, 0, 0))
	right.Draw(vgdraw.Crop(both, 17*vg.Centimeter, 0, 0, 0))
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	if _, err := canvas.WriteTo(f); err != nil {
		return err
	}
	return f.Close()
}

// growth is a cached token against goroutines, for those without allocations.
func growth() (*plot.Plot, error) {
	cred, src, tok := newSource()
	defer cred.Close()
	all := peers(src)
	who := []contestant{
		floor(tok), {"mitoken", func(context.Context) error { _, err := src.Token(); return err }},
		all[0], all[1], all[2], all[4],
	}
	names := []string{"the floor", "mitoken", "x/oauth2", "Google", "AWS", "client-go"}
	counts := []int{1, 4, 16, 64, 256}
	lines := make([]plotter.XYs, len(who))
	for i, n := range counts {
		ns, _ := costs(max(2, n), who) // in parallel throughout
		for j := range who {
			lines[j] = append(lines[j], plotter.XY{X: float64(i), Y: ns[j]})
		}
	}
	p := plot.New()
	p.Title.Text = "A cached token"
	p.X.Label.Text = "goroutines per CPU"
	p.Y.Label.Text = "ns per call"
	p.Y.Min = 0
	p.X.Tick.Marker = plot.ConstantTicks{{Value: 0, Label: "2"}, {Value: 1, Label: "4"}, {Value: 2, Label: "16"}, {Value: 3, Label: "64"}, {Value: 4, Label: "256"}}
	p.Legend.Top, p.Legend.Left = true, true
	for j, line := range lines {
		l, points, err := plotter.NewLinePoints(line)
		if err != nil {
			return nil, err
		}
		l.Color, l.Width = colors[j], vg.Points(1.8)
		points.Color, points.Shape = colors[j], vgdraw.CircleGlyph{}
		p.Add(l, points)
		p.Legend.Add(names[j], l)
	}
	p.Add(plotter.NewGrid())
	return p, nil
}

// attaching is what each transport costs.
func attaching() (*plot.Plot, error) {
	cred, src, _ := newSource()
	defer cred.Close()
	who := transports(src)
	ns, _ := costs(1, who)
	p := plot.New()
	p.Title.Text = "Attaching it"
	p.Y.Label.Text = "ns per request"
	p.Y.Min = 0
	var names []string
	for i, c := range who {
		bar, err := plotter.NewBarChart(plotter.Values{ns[i]}, vg.Points(34))
		if err != nil {
			return nil, err
		}
		bar.Color, bar.LineStyle.Width, bar.XMin = colors[[]int{1, 2, 5}[i]], 0, float64(i)
		p.Add(bar)
		names = append(names, c.name)
	}
	p.NominalX(names...)
	p.X.Min, p.X.Max = -0.6, float64(len(who))-0.4
	return p, nil
}
